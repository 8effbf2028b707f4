import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dslt.data import embedded
from dslt.data.datasets import hold_out_validation, read_released
from dslt.metrics import Accuracy
from dslt.records import Example, read_examples
from dslt.teacher.extract import ask_teachers, format_summary, write_extraction
from dslt.teacher.filters import FilterConfig
from dslt.teacher.parse import NLI, REASONS
from dslt.teacher.questions import LocalTeacher
from dslt.teacher.released import read_completions
from dslt.teacher.scripted import complete
from dslt.teacher.store import CompletionStore

SHARED_DATA = Path(
    os.environ.get("DSLT_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data")
)
needs_shared_data = pytest.mark.skipif(
    not (SHARED_DATA / "cqa").is_dir(),
    reason=f"the paper's released data is not at {SHARED_DATA}; set DSLT_SHARED_DATA",
)

PROBLEMS = [
    Example("right", "sums", "train", "1 + 1 ?", "( 1.0 + 1.0 )", answer_form="equation"),
    Example("wrong", "sums", "train", "1 + 2 ?", "( 1.0 + 2.0 )", answer_form="equation"),
    Example("rejected", "sums", "train", "1 + 3 ?", "( 1.0 + 3.0 )", answer_form="equation"),
    Example("silent", "sums", "test", "1 + 4 ?", "( 1.0 + 4.0 )", answer_form="equation"),
    Example("open", "sums", "test", "1 + 5 ?", None, answer_form="equation"),
]
COMPLETIONS = {
    "right": "One more. The answer is (1 + 1).",
    "wrong": "One less. The answer is (2 - 1).",
    "rejected": "Who knows? The answer is (175, 5).",
    "open": "Five more. The answer is (1 + 5).",
}


def run(directory, completions=COMPLETIONS, examples=PROBLEMS, name="t", **options):
    """Extracts with one local teacher, which gives each example its completion by id."""
    teacher = LocalTeacher(
        name,
        complete=lambda example, sample: completions.get(example.id),
        **options,
    )
    rows = range(len(examples))
    with CompletionStore(directory) as store:
        questions, _ = ask_teachers(examples, rows, [teacher], store, None)
        return write_extraction(examples, rows, questions, store, FilterConfig())


def read_lines(path):
    return Path(path).read_text(encoding="utf-8").split("\n")[:-1]


def test_every_example_is_kept_and_rejected_completions_teach_nothing(tmp_path):
    summary = run(tmp_path)
    records = {record.id: record for record in read_examples(summary.records_path)}
    assert list(records) == [problem.id for problem in PROBLEMS]
    assert records["right"].teacher_label == "( 1 + 1 )"
    assert records["right"].rationale == "One more."
    assert (records["right"].teacher, records["right"].prompt) == ("t", None)
    assert records["wrong"].teacher_label == "( 2 - 1 )"  # the filters are another stage
    for name in ("rejected", "silent"):
        assert records[name].teacher_label is None and records[name].rationale is None
    assert records["silent"].teacher is None
    assert all(records[problem.id].label == problem.label for problem in PROBLEMS)


def test_rejected_completions_are_listed_whole(tmp_path):
    summary = run(tmp_path)
    assert [json.loads(line) for line in read_lines(summary.rejected_path)] == [
        {
            "id": "rejected", "teacher": "t", "sample": 0, "reason": "not an equation",
            "completion": COMPLETIONS["rejected"],
        },
        {"id": "silent", "reason": "no completion", "completion": None},
    ]  # fmt: skip


def test_summary_counts_each_split_and_a_rejected_row_is_a_wrong_one(tmp_path):
    summary = run(tmp_path)
    train, test = summary.splits
    assert (train.dataset, train.split, train.examples, train.kept) == ("sums", "train", 3, 2)
    assert train.rejected == {"not an equation": 1}
    assert train.accuracy == Accuracy(correct=1, total=3)
    assert (test.examples, test.kept, test.rejected) == (2, 1, {"no completion": 1})
    assert test.accuracy == Accuracy(correct=0, total=1)  # the other has no gold label
    stored = json.loads((tmp_path / "summary.json").read_text())
    assert stored["splits"][0]["accuracy"] == {"correct": 1, "total": 3}
    table = format_summary(summary)
    assert "33.3 % ± 27.2" in table  # sqrt(1/3 · 2/3 / 3)
    assert "not an equation 1, no completion 1" in table
    assert summary.rejected_path in table


def test_answer_form_can_be_given(tmp_path):
    problem = Example("a", "mine", "train", "x", "Neutral")
    completions = {"a": "Why. The answer is neutral, I think."}
    summary = run(tmp_path, completions, [problem], form=NLI)
    assert summary.splits[0].accuracy == Accuracy(1, 1)
    assert next(read_examples(summary.records_path)).teacher_label == "neutral"


def test_same_records_are_kept_and_others_set_aside(tmp_path):
    summary = run(tmp_path)
    before = Path(summary.records_path).read_bytes()
    assert run(tmp_path) == summary and summary.set_aside is None
    changed = {**COMPLETIONS, "right": "Another reason. The answer is (1 + 1)."}
    other = run(tmp_path, changed)
    assert Path(other.set_aside).read_bytes() == before
    assert next(read_examples(other.records_path)).rationale == "Another reason."
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock", "completions.jsonl", Path(other.set_aside).name, "records.jsonl", "rejected.jsonl",
        "summary.json",
    ]  # fmt: skip
    again = run(tmp_path)  # and back: what is aside already is the same file
    assert Path(again.records_path).read_bytes() == before


def test_embedded_problems_go_through_with_mistakes_counted(tmp_path):
    examples = embedded.generate("facts", train=200, validation=0, test=0, seed=0)
    completions = {e.id: complete(e, mistake_rate=0.3, seed=1) for e in examples}
    (split,) = run(tmp_path, completions, examples).splits
    assert split.kept == 200 and split.rejected == {}
    assert 40 < 200 - split.accuracy.correct < 80


@needs_shared_data
@pytest.mark.parametrize(
    ("dataset", "correct", "kept"),
    [
        # The text alone, upper case and misspelt choices rejected, gives the 77.2 and 74.3 % that
        # are published; `(28 * 24) / 16` read up to its parenthesis gives SVAMP's test 74.0 %.
        ("svamp", {"train": 594, "test": 155}, {"train": 767, "test": 193}),
        ("cqa", {"train": 7342, "test": 958}, {"train": 9441, "test": 1193}),
    ],
)
def test_released_completions_reach_the_teachers_accuracy(tmp_path, dataset, correct, kept):
    examples = read_released(SHARED_DATA / dataset, dataset)
    completions = read_completions(SHARED_DATA / dataset, examples)
    summary = run(tmp_path, completions, examples, name="released")
    assert {split.split: split.accuracy.correct for split in summary.splits} == correct
    assert {split.split: split.kept for split in summary.splits} == kept
    listed = [json.loads(line) for line in read_lines(summary.rejected_path)]
    assert len(listed) == len(examples) - sum(kept.values())
    assert {row["reason"] for row in listed} <= set(REASONS)
    choices = {e.id: e.input for e in examples}
    for record in read_examples(summary.records_path):
        assert (record.rationale is None) == (record.teacher_label is None)
        assert "Q:" not in (record.rationale or "")
        if dataset == "cqa" and record.teacher_label:
            assert f") {record.teacher_label}" in choices[record.id]


@needs_shared_data
def test_held_out_validation_changes_no_completion(tmp_path):
    whole = read_released(SHARED_DATA / "svamp", "svamp")
    completions = read_completions(SHARED_DATA / "svamp", whole)
    assert read_completions(SHARED_DATA / "svamp", hold_out_validation(whole)) == completions
    assert completions["svamp-train-0"].startswith("Luke scored 84 points after 2 rounds.")


def test_teacher_wing_starts_neither_jax_nor_the_data_wing():
    code = (
        "import sys, dslt.metrics\n"
        "from dslt.teacher import extract, parse, released, scripted\n"
        "print([n for n in ('jax', 'tensorflow', 'seqio', 'dslt.data', 'dslt.core')"
        " if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
