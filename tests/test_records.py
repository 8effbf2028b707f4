import dataclasses
import json

import pytest

from dslt.errors import InputError
from dslt.records import (
    Example,
    Prediction,
    Rationale,
    labelled_splits,
    read_examples,
    read_predictions,
    write_rows,
)

EXAMPLE = Example(id="a", dataset="facts", split="train", input="premise: é ☃ \u2028 x", label="no")
ROW = {"id": "a", "dataset": "facts", "split": "train", "input": "1 + 1"}


def write_lines(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def error_of(path, read=read_examples):
    with pytest.raises(InputError) as caught:
        list(read(path))
    return str(caught.value)


def test_rows_survive_writing_and_reading(tmp_path):
    path = tmp_path / "new" / "records.jsonl"
    other = dataclasses.replace(
        EXAMPLE, id="b", teacher_label="yes", rationale="why", teacher="t", prompt="p",
        answer_form="equation", split="validation",
    )  # fmt: skip
    assert write_rows(path, [EXAMPLE, other]) == 2
    assert list(read_examples(path)) == [EXAMPLE, other]
    assert not list(path.parent.glob("*.partial"))


def test_several_weighted_rationales_survive_and_older_rows_stay_as_they_were(tmp_path):
    path = tmp_path / "records.jsonl"
    first = dataclasses.replace(
        EXAMPLE, id="first", rationale="why", teacher="t", rationale_weight=0.25
    )
    more = (Rationale("because", 0.5, "u", "p", is_hinted=True), Rationale("so", 0.25))
    several = dataclasses.replace(first, id="b", more_rationales=more)
    write_rows(path, [EXAMPLE, first, several])
    assert list(read_examples(path)) == [EXAMPLE, first, several]
    assert several.rationales() == (Rationale("why", 0.25, "t"), *more)
    assert EXAMPLE.rationales() == ()
    older, weighted, _ = (json.loads(line) for line in path.read_text("utf-8").split("\n")[:3])
    assert set(weighted) - set(older) == {"rationale_weight"}


def test_a_split_without_gold_labels_is_not_judged():
    unlabelled = dataclasses.replace(EXAMPLE, label=None, teacher_label="no")
    of_test = dataclasses.replace(unlabelled, split="test")
    assert labelled_splits([unlabelled, EXAMPLE, of_test]) == {"train"}


def test_predictions_survive_writing_and_reading(tmp_path):
    path = tmp_path / "predictions.jsonl"
    rows = [Prediction("a", "facts", "test", "1 + 1", "2", label="2", is_correct=True)]
    write_rows(path, rows)
    assert list(read_predictions(path)) == rows


def test_a_whole_number_is_one_with_a_fraction_of_zero(tmp_path):
    row = {"id": "a", "dataset": "d", "split": "test", "input": "x", "prediction": "y"}
    path = write_lines(tmp_path / "predictions.jsonl", [{**row, "probability": 1}])
    assert [read.probability for read in read_predictions(path)] == [1.0]
    path = write_lines(tmp_path / "predictions.jsonl", [{**row, "probability": "1"}])
    says = "'probability' is a string; expected number or null"
    assert error_of(path, read_predictions).endswith(says)


def test_interrupted_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "records.jsonl"
    write_rows(path, [EXAMPLE])

    def rows():
        yield dataclasses.replace(EXAMPLE, id="other")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rows(path, rows())
    assert list(read_examples(path)) == [EXAMPLE]


def test_missing_optional_fields_take_their_defaults_and_blank_lines_are_skipped(tmp_path):
    path = write_lines(tmp_path / "records.jsonl", [ROW, "", {**ROW, "id": "b"}])
    first, second = read_examples(path)
    assert (first.label, first.rationale, first.answer_form) == (None, None, "text")
    assert second.id == "b"


def test_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode())
    assert [row.id for row in read_examples(path)] == ["a"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "JSON list; expected an object"),
        ({k: v for k, v in ROW.items() if k != "input"}, "field 'input' is missing"),
        ({**ROW, "label": 1}, "field 'label' is a number; expected string or null"),
        ({**ROW, "id": None}, "field 'id' is a null; expected string"),
        ({**ROW, "lable": "x"}, "unknown field 'lable'"),
        ({**ROW, "split": "dev"}, "field 'split' is 'dev'; expected one of train, validation"),
        ({**ROW, "answer_form": "number"}, "field 'answer_form' is 'number'"),
        ({**ROW, "dataset": "my data"}, "field 'dataset' is 'my data'"),
        ({**ROW, "input": "  "}, "field 'input' is empty"),
        ({**ROW, "label": ""}, "field 'label' is blank; expected text, or null"),
        ({**ROW, "teacher_label": "\n"}, "field 'teacher_label' is blank"),
        ({**ROW, "rationale": " "}, "field 'rationale' is blank"),
        ({**ROW, "rationale": "x", "rationale_weight": 0}, "'rationale_weight' is 0; expected"),
        ({**ROW, "rationale": "x", "rationale_weight": 10**400}, "at most 1,000,000"),
        ({**ROW, "more_rationales": [{"text": "x"}]}, "without 'rationale'"),
        ({**ROW, "more_rationales": {}}, "'more_rationales' is a object; expected list"),
        ({**ROW, "more_rationales": ["x"]}, "item 0: is a string; expected object"),
        ({**ROW, "more_rationales": [{"text": "x", "wait": 1}]}, "item 0: unknown field 'wait'"),
        ({**ROW, "id": "first"}, "id 'first' is that of line 1"),
    ],
)
def test_error_names_path_line_and_fault(tmp_path, row, says):
    path = write_lines(tmp_path / "records.jsonl", [{**ROW, "id": "first"}, row])
    message = error_of(path)
    assert f"{path}:2: " in message
    assert says in message


def test_wrong_encoding_names_the_line(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b'\n{"id": "caf\xe9"}\n')
    assert f"{path}:2: byte 11 is not UTF-8" in error_of(path)


def test_first_twenty_faults_are_reported_together(tmp_path):
    path = write_lines(tmp_path / "records.jsonl", [{**ROW, "id": str(n)} for n in range(3)])
    bad = [{**ROW, "id": str(n), "label": n} for n in range(3, 33)]
    write_lines(path, [{**ROW, "id": str(n)} for n in range(3)] + bad)
    message = error_of(path)
    assert message.count("field 'label'") == 20
    assert f"{path}:4:" in message and f"{path}:23:" in message and f"{path}:24:" not in message


def test_nothing_is_yielded_after_the_first_fault(tmp_path):
    path = write_lines(tmp_path / "records.jsonl", [ROW, "{", {**ROW, "id": "b"}])
    seen = []
    with pytest.raises(InputError, match="1 unusable row"):
        seen.extend(read_examples(path))
    reader = read_examples(path)
    assert next(reader).id == "a"
    with pytest.raises(InputError):
        next(reader)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_file_without_rows_is_an_error(tmp_path, content):
    path = tmp_path / "records.jsonl"
    path.write_text(content)
    assert "has no rows" in error_of(path)


def test_missing_file_is_an_error_that_names_it(tmp_path):
    assert "No such file" in error_of(tmp_path / "nowhere.jsonl")
    assert str(tmp_path) in error_of(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 5000, '"\\ud800"', '{"a":' * 5000])
def test_what_the_json_reader_chokes_on_is_a_fault_of_its_line(tmp_path, value):
    path = write_lines(tmp_path / "records.jsonl", [ROW])
    path.write_text(path.read_text() + f'{{"id": {value}}}\n')
    assert f"{path}:2: " in error_of(path)
