"""What a rationale answers by itself, and how it is scored against the teacher's."""

import pytest

from dslt.records import Prediction
from dslt.report.rationales import overlap, own_answer, quality

CHOICE_INPUT = "where ?\nAnswer Choices:\n(a) nest\n(b) lake\n(c) nest box"
LABELS = ("contradiction", "entailment", "neutral")


def row(dataset="facts", text="?", answer_form="text", **fields):
    fields = {"prediction": "entailment", "label": "entailment"} | fields
    return Prediction(
        id="1", dataset=dataset, split="test", input=text, answer_form=answer_form, **fields
    )


@pytest.mark.parametrize(
    ("rationale", "of", "expected"),
    [
        ("red is red . it is entailment .", row(), "entailment"),
        ("no Contradiction , but neutral", row(), "neutral"),
        ("neutral at first . So the answer is entailment.", row(), "entailment"),
        ("ann has a hat .", row(), None),
        ("", row(), None),
        ("a robin sleeps in a nest , not in a lake", row("cqa", CHOICE_INPUT), "lake"),
        ("it sleeps in a Nest Box .", row("mine", CHOICE_INPUT), "nest box"),
        ("nestling", row("mine", CHOICE_INPUT), None),
        ("first 3 + 4 , then 7 * 2 .", row("sums"), "7 * 2"),
        ("there are 3 boxes of 4 . that is 3 times 4 .", row("sums"), "3 * 4"),
        ("1 minus 2 plus 3 .", row("mine", answer_form="equation"), "1 - 2 + 3"),
        ("there are 3 boxes of 4 .", row("sums"), None),
        ("divided by 0 is 3 / 0", row("sums"), None),
        ("it is fine .", row("reviews"), "fine"),
    ],
)
def test_a_rationales_own_answer(rationale, of, expected):
    labels = ("fine", "bad") if of.dataset == "reviews" else LABELS
    assert own_answer(rationale, of, labels)[0] == expected


def test_a_set_of_many_labels_is_no_set_to_choose_from():
    assert own_answer("it is l3", row("reviews"), [f"l{i}" for i in range(11)])[0] is None


def test_overlap_is_whole_for_equal_texts_and_none_for_foreign_ones():
    assert overlap([("a red hat .", "a red hat .")]) == (pytest.approx(100), pytest.approx(1))
    assert overlap([("xyz", "a red hat .")]) == (pytest.approx(0), pytest.approx(0))
    chrf, rouge = overlap([("a red hat", "a red hat"), ("red", "a red hat")])
    assert rouge == pytest.approx((1 + 0.5) / 2)  # recall 1/3, precision 1: F = 1/2
    assert 0 < chrf < 100


def test_quality_counts_what_is_there():
    found = quality([
        row(rationale="it is entailment .", teacher_rationale="it is entailment ."),
        row(rationale="it is neutral .", teacher_rationale="so it is entailment ."),
        row(rationale=" ", label="neutral"),
        row(rationale="a b"),
        row(),
    ])  # fmt: skip
    assert (found.rows, found.empty, found.stated, found.agreeing) == (4, 1, 2, 1)
    assert found.words == (4 + 4 + 0 + 2) / 4 and found.teacher_words == 4.5
    assert quality([row()]) is None
    assert quality([row(rationale="x")]).chrf is None


def test_a_long_hostile_text_is_read_in_time():
    assert own_answer("9 " * 50_000 + "." * 50_000, row("sums"))[0] is None
