import json

import pytest

from dslt.errors import InputError
from dslt.records import Example
from dslt.teacher.released import read_completions


def make_examples(rows, word="train", split="train"):
    return [Example(f"svamp-{word}-{row}", "svamp", split, "1 + 1") for row in range(rows)]


def write_files(directory, split, *texts_by_number):
    (directory / "llm").mkdir(exist_ok=True)
    for number, texts in enumerate(texts_by_number):
        (directory / "llm" / f"{split}_CoT_{number}.json").write_text(json.dumps(texts))


def error_of(directory, examples):
    with pytest.raises(InputError) as caught:
        read_completions(directory, examples)
    return str(caught.value)


def test_files_are_joined_by_k_as_a_number(tmp_path):
    write_files(tmp_path, "train", *[[f"completion {n}"] for n in range(12)])
    completions = read_completions(tmp_path, make_examples(12))
    assert completions["svamp-train-2"] == "completion 2"
    assert completions["svamp-train-11"] == "completion 11"
    assert len(completions) == 12


def test_row_finds_its_completion_by_id_in_any_order_and_split(tmp_path):
    write_files(tmp_path, "train", ["zero", "one"], ["two"])
    write_files(tmp_path, "test", ["other"])
    first, second, third = make_examples(3)
    held_out = make_examples(3, split="validation")[1]
    completions = read_completions(
        tmp_path, [third, held_out, *make_examples(1, "test", "test"), first]
    )
    assert completions == {
        "svamp-train-0": "zero", "svamp-train-1": "one", "svamp-train-2": "two",
        "svamp-test-0": "other",
    }  # fmt: skip
    assert second.id in completions


@pytest.mark.parametrize("rows", [2, 4])
def test_another_number_of_completions_than_of_rows_is_an_error(tmp_path, rows):
    write_files(tmp_path, "train", ["zero", "one"], ["two"])
    assert "3 completions of split 'train', and" in error_of(tmp_path, make_examples(rows))


def test_rows_must_be_all_of_the_split(tmp_path):
    write_files(tmp_path, "train", ["zero", "one"])
    first, _, third = make_examples(3)
    assert "up to row 2" in error_of(tmp_path, [first, third])


def test_what_cannot_be_read_is_named(tmp_path):
    assert "llm: cannot be read" in error_of(tmp_path, make_examples(1))
    write_files(tmp_path, "test", ["x"])
    assert "found train_CoT_K.json for K = none" in error_of(tmp_path, make_examples(1))
    write_files(tmp_path, "train", ["x"], ["x"], ["x"])
    (tmp_path / "llm" / "train_CoT_1.json").unlink()
    assert "K = [0, 2]; expected K = 0, 1, ..." in error_of(tmp_path, make_examples(2))
    for content, says in (('["x"', "cannot be read"), ('["x", 1]', "no JSON list of texts")):
        (tmp_path / "llm" / "train_CoT_1.json").write_text(content)
        message = error_of(tmp_path, make_examples(3))
        assert "train_CoT_1.json" in message and says in message


def test_ids_of_another_source_find_nothing_by_mistake(tmp_path):
    write_files(tmp_path, "train", ["zero"])
    assert "tfds_train_CoT_K" in error_of(tmp_path, make_examples(1, "tfds_train"))
    other = Example("6b81-97", "cqa", "train", "x")
    assert "'6b81-97' names no row" in error_of(tmp_path, [other])
