"""Suggested rows: nothing is left out, lengths that are given are kept, real data fills them."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from dslt.data.packing import plan_window
from dslt.data.row_shape import suggest_row_shape
from dslt.errors import InputError
from tests.data.test_packing import random_lengths, single

SHARED_DATA = Path(
    os.environ.get("DSLT_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data")
)


@pytest.mark.parametrize("batch_examples", [1, 4, 16, 64])
def test_a_suggested_shape_leaves_nothing_out(batch_examples):
    lengths = random_lengths(500, seed=batch_examples)
    order = single(500, batch_examples, seed=5)
    shape = suggest_row_shape(order, lengths)
    assert shape == suggest_row_shape(single(500, batch_examples, seed=6), lengths)
    assert shape.source_length % 8 == shape.target_length % 8 == 0
    for index in range(5):
        plan = plan_window(lengths[order.window(index)], shape, order.window_batches, (0, index))
        assert not plan.left_out.size


def test_given_lengths_are_kept_and_rows_follow():
    lengths = random_lengths(500)
    order = single(500, 32)
    assert suggest_row_shape(order, lengths, source_length=200).source_length == 200
    assert suggest_row_shape(order, lengths, target_length=77).target_length == 77
    both = suggest_row_shape(order, lengths, source_length=200, target_length=100)
    load = 32 * lengths.reshape(-1, 2).sum(0) / 500
    assert (both.source_length, both.target_length) == (200, 100)
    assert both.rows >= (load / (200, 100)).max()
    assert both.rows <= (load / (200, 100)).max() * 1.2 + 1


@pytest.mark.parametrize(("side", "limit"), [("source", "max_input"), ("target", "max_target")])
def test_a_given_length_below_the_longest_segment_says_which_limit_helps(side, limit):
    with pytest.raises(InputError, match=f"the longest {side} has .* or {limit}_length to at most"):
        suggest_row_shape(single(500), random_lengths(500), **{f"{side}_length": 5})


def real_texts(dataset: str) -> list[tuple[str, str, str]]:
    """(input, label, rationale) of the train split, the completions crudely cut."""
    folder = SHARED_DATA / dataset
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; set DSLT_SHARED_DATA to the released data")
    rows = [json.loads(line) for line in (folder / f"{dataset}_train.json").open(encoding="utf-8")]
    files = sorted((folder / "llm").glob("train_CoT_*.json"), key=lambda p: (len(p.stem), p.stem))
    completions = [text for path in files for text in json.loads(path.read_text(encoding="utf-8"))]
    texts = []
    for row, completion in zip(rows, completions, strict=True):
        question = row.get("input") or f"{row['question']}\nAnswer Choices:\n" + "\n".join(
            f"({letter}) {choice}" for letter, choice in zip("abcde", row["choices"], strict=True)
        )
        rationale = completion.split("Q:")[0].split(" answer is")[0]
        texts.append((question, row.get("label") or row["answer"], rationale))
    return texts


@pytest.mark.parametrize("dataset", ["svamp", "cqa"])
def test_rows_of_real_data_are_full_on_both_sides(dataset, tmp_path):
    from dslt.data.vocabulary import train_sentencepiece

    texts = real_texts(dataset)
    vocabulary = train_sentencepiece(
        (text for row in texts for text in row), 8000, tmp_path / "spiece.model"
    )
    lengths = np.array(
        [
            [1 + len(vocabulary.encode(text)) for text in ("predict: " + a, b, "explain: " + a, c)]
            for a, b, c in texts
        ]
    )
    for batch_examples in (16, 32, 64):
        order = single(len(lengths), batch_examples)
        shape = suggest_row_shape(order, lengths)
        for index in range(3):
            plan = plan_window(
                lengths[order.window(index)], shape, order.window_batches, (0, index)
            )
            cells = shape.rows * order.window_batches
            assert plan.segments.source_length.sum() >= 0.9 * cells * shape.source_length
            assert plan.segments.target_length.sum() >= 0.9 * cells * shape.target_length
            assert len(plan.left_out) <= 1
