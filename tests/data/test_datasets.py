import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dslt.data.datasets import (
    choice_input,
    hold_out_validation,
    nli_input,
    read_released,
    read_table,
    read_tfds,
)
from dslt.errors import InputError
from dslt.records import Example

SHARED_DATA = Path(
    os.environ.get("DSLT_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data")
)
needs_shared_data = pytest.mark.skipif(
    not (SHARED_DATA / "cqa").is_dir(),
    reason=f"the paper's released data is not at {SHARED_DATA}; set DSLT_SHARED_DATA",
)

SVAMP = {"input": "Ann has 3.\nHow many?", "label": "( 3.0 + 1.0 )"}
CQA = {"id": "x", "question": "Where?", "choices": ["ice ", "a b", "c"], "answer": "a b"}
NLI = {"premise": "It rains.", "hypothesis": "It is wet.", "label": "neutral"}


def write_json_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_text(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def error_of(read, *arguments, **options):
    with pytest.raises(InputError) as caught:
        read(*arguments, **options)
    return str(caught.value)


def table_error(path, **options):
    options = {"input_columns": ["text"], "label_column": "label", **options}
    return error_of(read_table, path, "mine", **options)


# The released layout


def test_each_released_format_becomes_examples(tmp_path):
    write_json_lines(tmp_path / "svamp_train.json", [SVAMP, SVAMP])
    write_json_lines(tmp_path / "svamp_test.json", [SVAMP])
    first, second, test = read_released(tmp_path, "svamp")
    assert first == Example(
        "svamp-train-0", "svamp", "train", SVAMP["input"], SVAMP["label"], answer_form="equation"
    )
    assert (second.id, test.id, test.split) == ("svamp-train-1", "svamp-test-0", "test")

    write_json_lines(tmp_path / "cqa_train.json", [CQA])
    write_json_lines(tmp_path / "cqa_test.json", [CQA])
    example = read_released(tmp_path, "cqa")[0]
    assert example.input == "Where?\nAnswer Choices:\n(a) ice\n(b) a b\n(c) c"
    assert (example.label, example.answer_form) == ("a b", "text")


@pytest.mark.parametrize("dataset", ["esnli", "anli1"])
def test_nli_labels_are_names_or_class_ids_and_a_validation_file_is_used(tmp_path, dataset):
    rows = [{**NLI, "label": label} for label in (0, 1, 2, "contradiction")]
    write_json_lines(tmp_path / f"{dataset}_train.json", rows)
    write_json_lines(tmp_path / f"{dataset}_valid.json", [NLI])
    write_json_lines(tmp_path / f"{dataset}_test.json", [NLI])
    examples = read_released(tmp_path, dataset)
    assert [e.label for e in examples[:4]] == [
        "entailment", "neutral", "contradiction", "contradiction",
    ]  # fmt: skip
    assert examples[0].input == "premise: It rains. hypothesis: It is wet."
    assert [(e.id, e.split) for e in examples[4:]] == [
        (f"{dataset}-valid-0", "validation"),
        (f"{dataset}-test-0", "test"),
    ]
    assert hold_out_validation(examples) == examples


def test_json_list_is_read_as_json_lines_are(tmp_path):
    write_json_lines(tmp_path / "lines" / "svamp_train.json", [SVAMP, SVAMP])
    write_json_lines(tmp_path / "lines" / "svamp_test.json", [SVAMP])
    (tmp_path / "list").mkdir()
    write_text(tmp_path / "list" / "svamp_train.json", "\ufeff" + json.dumps([SVAMP, SVAMP]))
    write_text(tmp_path / "list" / "svamp_test.json", json.dumps([SVAMP], indent=2))
    assert read_released(tmp_path / "list", "svamp") == read_released(tmp_path / "lines", "svamp")


@pytest.mark.parametrize(
    ("dataset", "row", "says"),
    [
        ("svamp", {"input": "x"}, "column 'label' is missing; found 'input'"),
        ("svamp", {**SVAMP, "label": 42}, "column 'label' is 42, which is not text; write it in"),
        ("svamp", {**SVAMP, "input": " "}, "column 'input' is ' '; expected text"),
        ("cqa", {**CQA, "answer": "d"}, "answer 'd' is none of the choices"),
        ("cqa", {**CQA, "choices": "a b"}, "expected a list of texts"),
        ("esnli", {**NLI, "label": 3}, "label is 3; expected one of entailment (0)"),
        ("esnli", {**NLI, "label": -1}, "label is -1"),
        ("anli1", {**NLI, "label": True}, "label is True"),
        ("anli1", {**NLI, "label": "maybe"}, "label is 'maybe'"),
    ],
)
def test_unusable_released_row_is_named(tmp_path, dataset, row, says):
    good = {"svamp": SVAMP, "cqa": CQA, "esnli": NLI, "anli1": NLI}[dataset]
    path = write_json_lines(tmp_path / f"{dataset}_train.json", [good, row])
    message = error_of(read_released, tmp_path, dataset)
    assert f"{path}:2: " in message and says in message


def test_missing_released_file_and_unknown_dataset_are_named(tmp_path):
    assert "svamp_train.json: cannot be read" in error_of(read_released, tmp_path, "svamp")
    assert "dataset is 'squad'; expected one of svamp" in error_of(read_released, ".", "squad")


@needs_shared_data
@pytest.mark.parametrize(
    ("dataset", "counts"),
    [("svamp", (720, 80, 200)), ("cqa", (8766, 975, 1221))],
)
def test_released_data_splits_into_the_papers_counts(dataset, counts):
    whole = read_released(SHARED_DATA / dataset, dataset)
    examples = hold_out_validation(whole)
    by_split = collections.Counter(example.split for example in examples)
    assert tuple(by_split[split] for split in ("train", "validation", "test")) == counts
    assert [e.id for e in examples] == [e.id for e in whole]
    assert examples[0].input.startswith(
        {"svamp": "Luke scored 84 points", "cqa": '"There are 10 apples'}[dataset]
    )


# Held-out validation


def make_examples(train, test=2):
    splits = ["train"] * train + ["test"] * test
    return [Example(f"d-{s}-{n}", "d", s, f"text {n}") for n, s in enumerate(splits)]


def test_held_out_rows_keep_id_order_and_test_split_and_follow_the_seed():
    examples = make_examples(30)
    held = hold_out_validation(examples, fraction=0.1, seed=0)
    assert [e.id for e in held] == [e.id for e in examples]
    assert [e.split for e in held].count("validation") == 3
    assert [e.split for e in held[30:]] == ["test", "test"]
    assert held == hold_out_validation(examples, fraction=0.1, seed=0)
    assert held != hold_out_validation(examples, fraction=0.1, seed=1)


@pytest.mark.parametrize(
    ("fraction", "train", "count"),
    [(0.1, 31, 4), (0.1, 30, 3), (0.07, 100, 7)],  # 0.07 * 100 is above 7 in binary
)
def test_share_is_rounded_up_but_not_by_a_rounding_error(fraction, train, count):
    held = hold_out_validation(make_examples(train), fraction=fraction)
    assert [e.split for e in held].count("validation") == count


def test_without_a_train_split_nothing_is_held_out():
    examples = [Example("a", "d", "test", "what ?")]
    assert hold_out_validation(examples) == examples


@pytest.mark.parametrize(
    ("fraction", "train"),
    [(0.0, 10), (1.0, 10), (0.1, 1), (float("nan"), 10), (float("inf"), 10)],
)
def test_fraction_that_empties_a_split_is_refused(fraction, train):
    with pytest.raises(InputError, match="validation fraction"):
        hold_out_validation(make_examples(train), fraction=fraction)


# Tables


def test_csv_with_quotes_commas_and_line_breaks(tmp_path):
    path = write_text(
        tmp_path / "t.csv",
        '\ufefftext,label,why,fold\r\n"one, two\nthree",yes,because,train\r\n'
        'four,,,dev\r\n\r\n"say ""hi""",no,,TEST\r\n',
    )
    examples = read_table(
        path, "mine", input_columns=["text"], label_column="label", rationale_column="why",
        split_column="fold",
    )  # fmt: skip
    assert [(e.id, e.split, e.input, e.label, e.rationale) for e in examples] == [
        ("mine-train-0", "train", "one, two\nthree", "yes", "because"),
        ("mine-dev-1", "validation", "four", None, None),
        ("mine-test-2", "test", 'say "hi"', "no", None),
    ]


def test_json_table_with_several_inputs_ids_and_unnamed_columns(tmp_path):
    rows = [
        {"key": "k1", "premise": "p", "hypothesis": "h", "gold": "2 + 3", "extra": [1]},
        {"key": "k2", "premise": "q", "hypothesis": "i", "gold": None},
    ]
    path = write_json_lines(tmp_path / "t.jsonl", rows)
    examples = read_table(
        path, "mine", input_columns=["premise", "hypothesis"], label_column="gold",
        id_column="key", split="valid", answer_form="equation",
    )  # fmt: skip
    assert examples == [
        Example("k1", "mine", "validation", "premise: p hypothesis: h", "2 + 3",
                answer_form="equation"),
        Example("k2", "mine", "validation", "premise: q hypothesis: i", answer_form="equation"),
    ]  # fmt: skip


def test_an_equation_without_a_value_is_no_label(tmp_path):
    rows = [{"q": "?", "a": answer} for answer in ("84 / 2", "50%", "3 x 4", "1/0")]
    path = write_json_lines(tmp_path / "t.jsonl", rows)
    columns = {"input_columns": ["q"], "label_column": "a"}
    with pytest.raises(InputError) as error:
        read_table(path, "mine", **columns, answer_form="equation")
    for line, label in ((2, "50%"), (3, "3 x 4"), (4, "1/0")):
        assert f"{path}:{line}: label {label!r} has no value; expected numbers" in str(error.value)
    assert f"{path}:1" not in str(error.value)
    assert len(read_table(path, "mine", **columns)) == 4


def test_missing_column_names_what_was_found_and_the_nearest(tmp_path):
    path = write_text(tmp_path / "t.csv", "text,lable\na,b\n")
    message = table_error(path)
    assert f"{path}:1: column 'label' is missing; found 'text', 'lable'" in message
    assert "did you mean 'lable'?" in message
    path = write_json_lines(tmp_path / "t.jsonl", [{"text": "a", "label": "b"}, {"txt": "a"}])
    assert f"{path}:2: column 'text' is missing; found 'txt'; did you mean 'txt'?" in table_error(
        path
    )


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "a", "label": 1}, "column 'label' is 1, which is not text"),
        ({"text": "a", "label": 0.5}, 'write it in double quotes, "0.5", or a class id'),
        ({"text": "a", "label": False}, "column 'label' is false"),
        ({"text": "a", "label": ["b"]}, "column 'label' is ['b']; expected text"),
        ({"text": "a", "label": ""}, "column 'label' is empty"),
        ({"text": None, "label": "b"}, "column 'text' is empty; expected text"),
        ([1], "expected an object"),
    ],
)
def test_value_that_is_no_text_is_an_error_with_its_line(tmp_path, row, says):
    path = write_json_lines(tmp_path / "t.jsonl", [{"text": "a", "label": "b"}, row])
    message = table_error(path)
    assert f"{path}:2: " in message and says in message


def test_ragged_rows_and_stray_quotes_are_named(tmp_path):
    path = write_text(tmp_path / "t.csv", "text,label\na,b\na,b,c\na\n")
    message = table_error(path)
    assert f"{path}:3: 3 cells; expected 2" in message
    assert f"{path}:4: 1 cells; expected 2" in message
    path = write_text(tmp_path / "u.csv", 'text,label\n"a" x,b\n')
    assert f"{path}:2: not CSV" in table_error(path)


def test_twenty_faults_at_most_are_reported_together(tmp_path):
    rows = [{"text": "a", "label": 1}] * 30
    message = table_error(write_json_lines(tmp_path / "t.jsonl", rows))
    assert message.count("not text") == 20 and "20 unusable rows" in message
    path = write_text(tmp_path / "t.csv", "text,label\n" + "a\n" * 30)
    assert table_error(path).count("1 cells") == 20


def test_wrong_encoding_names_the_line(tmp_path):
    path = write_text(tmp_path / "t.csv", "text,label\na,b\ncafé,b\n", encoding="latin-1")
    assert f"{path}:3: byte 0xe9 is not UTF-8" in table_error(path)
    path = write_text(tmp_path / "t.jsonl", '{"text": "café"}\n', encoding="latin-1")
    assert f"{path}:1: byte" in table_error(path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.csv", "", "is empty"),
        ("t.csv", "text,label\n", "has no rows"),
        ("t.jsonl", "", "has no rows"),
        ("t.json", "[]", "has no rows"),
        ("t.json", "[{", "not a JSON list"),
        ("t.csv", "text,label,text\na,b,c\n", "column 'text' occurs twice"),
        ("t.txt", "text\na\n", "is no .jsonl, .json or .csv file"),
    ],
)
def test_file_that_holds_no_table_is_named(tmp_path, name, content, says):
    message = table_error(write_text(tmp_path / name, content))
    assert str(tmp_path / name) in message and says in message


def test_other_faults_of_tables(tmp_path):
    path = write_text(tmp_path / "t.csv", "text,label,fold,key\na,b,train,1\na,b,tain,1\n")
    assert f"{path}:3: column 'fold' is 'tain'" in table_error(path, split_column="fold")
    assert f"{path}:3: id '1' is that of {path}:2" in table_error(path, id_column="key")
    assert "field 'split' is 'tain'" in table_error(path, split="tain")
    assert "field 'answer_form' is 'number'" in table_error(path, answer_form="number")
    assert "no input column" in table_error(path, input_columns=[])
    assert "field 'dataset' is 'my data'" in error_of(
        read_table, path, "my data", input_columns=["text"]
    )
    assert "cannot be read" in table_error(tmp_path / "nowhere.csv")


# TensorFlow Datasets


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """The real builders' features, with a few rows of our own, prepared as TFDS prepares them."""
    tfds = pytest.importorskip("tensorflow_datasets")
    directory = tmp_path_factory.mktemp("tfds")
    explained = {"explanation_1": "so", "explanation_2": "", "explanation_3": ""}
    esnli = {"premise": "pé", "hypothesis": "h", **explained}
    anli = {"uid": "u", "context": "c", "hypothesis": "h"}
    cose = {
        "id": "i", "question": "q", "choices": ["x", "y"], "answer": "y",
        "abstractive_explanation": "so", "extractive_explanation": "",
    }  # fmt: skip
    rows = {
        "esnli": {
            "train": [{**esnli, "label": "neutral"}, {**esnli, "label": "contradiction"}],
            "validation": [{**esnli, "label": "entailment"}],
            "test": [{**esnli, "label": "neutral"}],
        },
        "anli/r1": {
            "train": [{**anli, "label": label} for label in "enc"],
            "validation": [{**anli, "label": "n"}],
            "test": [{**anli, "label": "c"}],
        },
        "cos_e": {"train": [cose], "validation": [{**cose, "answer": "x"}]},
    }
    for name, splits in rows.items():
        builder = tfds.builder(name, data_dir=directory)
        Path(builder.data_dir).mkdir(parents=True)
        writer = tfds.core.SequentialWriter(builder.info, max_examples_per_shard=100)
        writer.initialize_splits(list(splits))
        writer.add_examples(splits)
        writer.close_all()
    return directory


def test_tfds_datasets_become_examples(tfds_dir):
    esnli = read_tfds("esnli", tfds_dir)
    assert [(e.id, e.split, e.label) for e in esnli] == [
        ("esnli-tfds_train-0", "train", "neutral"),
        ("esnli-tfds_train-1", "train", "contradiction"),
        ("esnli-tfds_validation-0", "validation", "entailment"),
        ("esnli-tfds_test-0", "test", "neutral"),
    ]
    assert esnli[0].input == nli_input("pé", "h")
    anli = read_tfds("anli1", tfds_dir)
    assert [e.label for e in anli] == [
        "entailment", "neutral", "contradiction", "neutral", "contradiction",
    ]  # fmt: skip
    assert anli[0].input == nli_input("c", "h")


def test_tfds_cos_e_validation_is_the_test_split_and_validation_is_held_out(tfds_dir):
    cqa = read_tfds("cqa", tfds_dir)
    assert [(e.id, e.split, e.label) for e in cqa] == [
        ("cqa-tfds_train-0", "train", "y"),
        ("cqa-tfds_validation-0", "test", "x"),
    ]
    assert cqa[0].input == choice_input("q", ["x", "y"])


def test_tfds_that_cannot_load_says_what_was_tried(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    message = error_of(read_tfds, "esnli", tmp_path, download=False)
    assert "tfds.load('esnli'" in message and str(tmp_path) in message
    assert "dataset is 'snli'" in error_of(read_tfds, "snli", tmp_path)


def test_importing_the_module_starts_no_tensorflow_and_no_seqio():
    code = (
        "import sys, dslt.data.datasets, dslt.data.embedded\n"
        "print([n for n in ('tensorflow', 'tensorflow_datasets', 'seqio', 'jax')"
        " if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
