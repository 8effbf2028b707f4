import dataclasses

import pytest

from dslt.errors import InputError
from dslt.records import Example
from dslt.teacher.filters import (
    ENOUGH,
    NEAR_DUPLICATE,
    NOT_GOLD,
    NOT_MAJORITY,
    REPEATS_QUESTION,
    TELLS_HINT,
    TOO_LONG,
    TOO_SHORT,
    Candidate,
    FilterConfig,
    choose,
)
from dslt.teacher.parse import EQUATION, NLI, NO_ANSWER, Parsed
from dslt.teacher.questions import LocalTeacher

EXAMPLE = Example(
    "x", "esnli", "train", "premise: the old dog sleeps . hypothesis: a cat runs .", "neutral"
)
TEACHER = LocalTeacher("t", samples=4, form=NLI)


def candidates(*said, teacher=TEACHER, is_hinted=False):
    """Candidates of one teacher from (answer, rationale); an answer of None is unparsed."""
    return [
        Candidate(
            teacher,
            sample,
            is_hinted,
            Parsed(why, answer, None) if answer else Parsed(None, None, NO_ANSWER),
        )
        for sample, (answer, why) in enumerate(said)
    ]


def test_the_majority_is_the_label_and_its_explanations_are_kept():
    given = candidates(
        ("contradiction", "first"), ("neutral", "second"), (None, ""), ("neutral", "third")
    )
    choice = choose(EXAMPLE, given, FilterConfig(max_rationales=3))
    assert choice.label == "neutral"
    assert [(each.text, each.weight) for each in choice.kept] == [("second", 0.5), ("third", 0.5)]
    assert choice.reasons == (NOT_MAJORITY, None, NO_ANSWER, None)


def test_equations_vote_by_value():
    teacher = LocalTeacher("t", samples=3, form=EQUATION)
    example = Example("x", "sums", "train", "?", "( 4 )", answer_form="equation")
    given = candidates(("( 5 )", "a"), ("( 2 + 2 )", "b"), ("( 2 * 2 )", "c"), teacher=teacher)
    assert choose(example, given, FilterConfig()).label == "( 2 + 2 )"


def test_teachers_vote_and_weigh_by_their_weight():
    heavy = LocalTeacher("heavy", weight=0.7, form=NLI)
    light = LocalTeacher("light", weight=0.3, samples=2, form=NLI)
    given = candidates(("entailment", "a b c"), ("entailment", "d e f"), teacher=light)
    given += candidates(("neutral", "g h i"), teacher=heavy)
    choice = choose(EXAMPLE, given, FilterConfig(keep="legal", max_rationales=2))
    assert choice.label == "neutral"
    weights = {each.text: (each.teacher, each.weight) for each in choice.kept}
    assert weights == {
        "a b c": ("light", 0.15), "d e f": ("light", 0.15), "g h i": ("heavy", 0.7),
    }  # fmt: skip


def test_a_tie_goes_to_the_first():
    given = candidates(("contradiction", "a"), ("neutral", "b"))
    assert choose(EXAMPLE, given, FilterConfig()).label == "contradiction"


def test_only_explanations_of_the_gold_answer():
    given = candidates(("contradiction", "a"), ("contradiction", "b"), ("Neutral", "c"))
    choice = choose(EXAMPLE, given, FilterConfig(keep="gold", max_rationales=4))
    assert choice.label == "contradiction"  # what the teacher said stays what it said
    assert [each.text for each in choice.kept] == ["c"] and choice.reasons[:2] == (NOT_GOLD,) * 2


def test_a_hinted_answer_is_marked_has_no_vote_and_may_not_speak_of_the_hint():
    given = candidates(("contradiction", "a"))
    for text, reason in (("As the Hint says.", TELLS_HINT), ("A dog is no cat.", None)):
        hinted = candidates(("neutral", text), is_hinted=True)
        choice = choose(EXAMPLE, given + hinted, FilterConfig(keep="gold"))
        assert choice.label == "contradiction" and choice.reasons == (NOT_GOLD, reason)
        assert [each.is_hinted for each in choice.kept] == [True] * (reason is None)


def test_length_bounds_are_inclusive():
    config = FilterConfig(min_words=2, max_words=3, max_rationales=9)
    given = candidates(*(("neutral", " ".join("abcd"[:words])) for words in (1, 2, 3, 4)))
    assert choose(EXAMPLE, given, config).reasons == (TOO_SHORT, None, None, TOO_LONG)


def test_near_duplicates_and_more_than_enough():
    said = ["one two three four five six", "One two three four five six!", "one two three four six",
            "something else is the case", "and yet another thing holds"]  # fmt: skip
    given = candidates(*(("neutral", text) for text in said))
    config = FilterConfig(max_rationales=2, max_similarity=0.3)
    reasons = choose(EXAMPLE, given, config).reasons
    assert reasons == (None, NEAR_DUPLICATE, NEAR_DUPLICATE, None, ENOUGH)
    loose = choose(EXAMPLE, given, dataclasses.replace(config, max_similarity=1.0))
    assert loose.reasons == (None, NEAR_DUPLICATE, None, ENOUGH, ENOUGH)


def test_a_rationale_that_repeats_the_question():
    said = ["The old dog sleeps.", "The old dog sleeps, so it may or may not be that a cat runs."]
    given = candidates(*(("neutral", text) for text in said))
    config = FilterConfig(max_question_overlap=0.8, max_rationales=2)
    assert choose(EXAMPLE, given, config).reasons == (REPEATS_QUESTION, None)
    assert choose(EXAMPLE, given, FilterConfig(max_rationales=2)).reasons == (None, None)


def test_options_are_checked():
    for wrong in ({"keep": "best"}, {"max_rationales": 0}, {"max_similarity": 0.0}):
        with pytest.raises(InputError, match="expected"):
            FilterConfig(**wrong)
