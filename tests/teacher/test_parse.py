import json

import pytest

from dslt.records import Example
from dslt.teacher.parse import (
    CHOICE,
    EMPTY_RATIONALE,
    EQUATION,
    NLI,
    NO_ANSWER,
    NO_CHOICE,
    NO_EQUATION,
    REASONS,
    TEXT,
    TRUNCATED,
    TWO_ANSWERS,
    AnswerForm,
    Parsed,
    answer_form,
    choices_of,
    cut_at_next_exemplar,
    parse_completion,
)

CHOICES = ["park", "coloring book", "garden center", "math problem", "being good."]


def answer_of(completion, form, choices=CHOICES):
    parsed = parse_completion(f"Why. {completion}", form, choices)
    assert parsed.reason is None, parsed.reason
    assert parsed.rationale == "Why."
    return parsed.answer


def reason_of(completion, form, choices=CHOICES):
    parsed = parse_completion(f"Why. {completion}", form, choices)
    assert parsed.rationale is None and parsed.answer is None
    return parsed.reason


def test_completions_as_palm_gave_them():
    svamp = (
        "Luke scored 84 points after 2 rounds. 84 / 2 = 42. The answer is (84 / 2).\n\n"
        "Q: There are 120 students.\nA: 1/3 of 120 is 40. The answer is (120 /"
    )
    assert parse_completion(svamp, EQUATION) == Parsed(
        "Luke scored 84 points after 2 rounds. 84 / 2 = 42.", "( 84 / 2 )", None
    )
    cqa = (
        "The answer must be about numbers. Of the above choices, only math problem is. "
        "So the answer is (d) math problem.\n\nQ: Where?\nAnswer Choices:\n(a) here\nA: The"
    )
    assert parse_completion(cqa, CHOICE, CHOICES) == Parsed(
        "The answer must be about numbers. Of the above choices, only math problem is.",
        "math problem",
        None,
    )
    esnli = "It rains,\nso it is wet.\nAnswer: entailment\n\nPremise: Two men\nHypothesis: Answer:"
    assert parse_completion(esnli, NLI) == Parsed("It rains, so it is wet.", "entailment", None)
    anli = "Rain is wet. So the answer is contradiction.\n\nPremise: x. So the answer is neutral."
    assert parse_completion(anli, NLI) == Parsed("Rain is wet.", "contradiction", None)


@pytest.mark.parametrize("start", ["Q: x", "Question: x", "  Premise: x", "\nQ : x"])
def test_completion_ends_where_a_line_begins_the_next_exemplar(start):
    assert cut_at_next_exemplar(f"Why.\n{start}") == ("Why.", True)
    assert cut_at_next_exemplar("The Q: of it.") == ("The Q: of it.", False)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("So the answer is (d) math problem.", "math problem"),
        ("so the answer is (D) Math  Problem", "math problem"),
        ("**Answer:** (d) math problem", "math problem"),
        ("The answer is **(d) math problem**.", "math problem"),
        ("Therefore, the correct answer is: d) math problem", "math problem"),
        ("The final answer is d.", "math problem"),
        ("The answer is (d).", "math problem"),
        ('The answer is "math problem".', "math problem"),
        ("The answer is (d) math problem. It has numbers in it.", "math problem"),
        ("The answer is (d) math problem\nbecause of the numbers", "math problem"),
        ("So the answer is (e) being good.", "being good."),
        ("So the answer is (d) math probelm.", "math problem"),  # nearly spelt
        ("So the answer is (c) park.", "park"),  # the text decides, not the letter
        ("So the answer is coloring book.", "coloring book"),
    ],
)
def test_choice_is_read_leniently(completion, answer):
    assert answer_of(completion, CHOICE) == answer


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("So the answer is (d) driving.", NO_CHOICE),
        ("So the answer is (h) driving.", NO_CHOICE),
        ("So the answer is one of these four.", NO_CHOICE),
        ("So the answer is either (a) park or (d) math problem.", TWO_ANSWERS),
        ("So the answer is (a) park or (b) coloring book.", TWO_ANSWERS),
        ("The answer is (a) park. No, the answer is (d) math problem.", TWO_ANSWERS),
        ("The answer must be a park.", NO_ANSWER),
        ("So the answer is", TRUNCATED),
        ("So the answer is (d) ma", TRUNCATED),
        ("A park has trees and", TRUNCATED),
    ],
)
def test_what_is_no_choice_has_its_reason(completion, reason):
    assert reason_of(completion, CHOICE) == reason


def test_a_letter_within_a_choices_text_names_no_other_choice():
    choices = ["vitamin (c)", "iron", "zinc"]
    for said in ("(a) vitamin (c).", "vitamin (c)", "(a)", "(A) Vitamin (C)"):
        assert answer_of(f"So the answer is {said}", CHOICE, choices) == "vitamin (c)"
    both = "So the answer is (a) vitamin (c) or (b) iron."
    assert reason_of(both, CHOICE, choices) == TWO_ANSWERS
    assert reason_of("So the answer is (b) iron. (c) zinc.", CHOICE, choices) == TWO_ANSWERS


def test_same_choice_twice_in_the_list_is_one_answer():
    choices = ["bus depot", "beach", "train station", "bridge", "bridge"]
    for letter in "de":
        assert answer_of(f"So the answer is ({letter}) bridge.", CHOICE, choices) == "bridge"


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("The answer is (84 / 2).", "( 84 / 2 )"),
        ("The answer is 84/2", "( 84 / 2 )"),
        ("The answer is (12 - 2) - 7.", "( ( 12 - 2 ) - 7 )"),
        ("The answer is (17 + 15 + 2).", "( 17 + 15 + 2 )"),
        ("The answer is (84 / 2) = 42.", "( 84 / 2 )"),
        ("The answer is $1,000 × 2.", "( 1000 * 2 )"),
        ("Answer: **84 / 2**", "( 84 / 2 )"),
        ("The answer is (84 / 2). That is 42.", "( 84 / 2 )"),
        ("The answer is 12 - 2 cups of flour.", "( 12 - 2 )"),
        ("The answer is 12 / 2 party hats.", "( 12 / 2 )"),
        ("The answer is (2).", "( 2 )"),
    ],
)
def test_equation_is_read_leniently(completion, answer):
    assert answer_of(completion, EQUATION) == answer


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("The answer is (175, 5).", NO_EQUATION),
        ("The answer is (23 + x).", NO_EQUATION),
        ("The answer is 2 x.", NO_EQUATION),
        ("The answer is 1.5 million.", NO_EQUATION),
        ("The answer is 20 percent of it.", NO_EQUATION),
        ("The answer is 3 Hundred.", NO_EQUATION),
        ("The answer is 2 dozen eggs.", NO_EQUATION),
        ("The answer is 84 divided by two.", NO_EQUATION),
        ("The answer is 84 halved.", NO_EQUATION),
        ("The answer is 5 times four.", NO_EQUATION),
        ("The answer is 80 and twenty.", NO_EQUATION),
        ("The answer is (7x = 14).", NO_EQUATION),
        ("The answer is (84 / 2) = 43.", NO_EQUATION),
        ("The answer is (some - 8).", NO_EQUATION),
        ("The answer is (1 / 0).", NO_EQUATION),
        ("The answer is (8 / 4) and (6 / 4).", TWO_ANSWERS),
        ("The answer is 5. So the answer is 6.", TWO_ANSWERS),
        ("The answer is ((491 - 21", TRUNCATED),
    ],
)
def test_what_is_no_equation_has_its_reason(completion, reason):
    assert reason_of(completion, EQUATION) == reason


def test_an_answer_that_was_cut_off_by_the_next_exemplar_is_whole():
    completion = "Why. The answer is (23 + x)\n\nQ: Next"
    assert parse_completion(completion, EQUATION).reason == NO_EQUATION


def test_same_answer_given_twice_is_one_answer():
    parsed = parse_completion("The answer is 42. It is 84 / 2. So the answer is 84/2.", EQUATION)
    assert (parsed.answer, parsed.reason) == ("( 84 / 2 )", None)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("So the answer is entailment.", "entailment"),
        ("Answer: Neutral", "neutral"),
        ("The answer is *contradiction*.", "contradiction"),
        ("The answer is contradiction, because red is not blue.", "contradiction"),
    ],
)
def test_nli_label_is_read_leniently(completion, answer):
    assert answer_of(completion, NLI) == answer


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("So the answer is not entailment.", NO_CHOICE),
        ("So the answer is unclear.", NO_CHOICE),
        ("So the answer is neutrality.", NO_CHOICE),
        ("So the answer is neutral or contradiction.", TWO_ANSWERS),
        ("So the answer is contradic", TRUNCATED),
    ],
)
def test_what_is_no_nli_label_has_its_reason(completion, reason):
    assert reason_of(completion, NLI) == reason


def test_label_sets_of_ones_own():
    form = AnswerForm("label", ("Positive", "very positive", "not sure!"))
    assert answer_of("The answer is very positive.", form) == "very positive"
    assert answer_of("The answer is positive.", form) == "Positive"
    assert answer_of("The answer is Not sure.", form) == "not sure!"
    with pytest.raises(ValueError, match="only `label` has some"):
        AnswerForm("label")
    with pytest.raises(ValueError, match="kind is 'number'"):
        AnswerForm("number")


def test_a_label_within_another_ones_word_is_a_label_of_its_own():
    form = AnswerForm("label", ("male", "female", "not female"))
    assert reason_of("The answer is female, and the other one male.", form) == TWO_ANSWERS
    assert answer_of("The answer is female.", form) == "female"
    assert answer_of("The answer is not female.", form) == "not female"


def test_labels_that_differ_in_punctuation_alone_are_taken_only_as_they_are_spelt():
    form = AnswerForm("label", ("C", "C++", "C#", "Java"))
    for label in form.labels:
        assert answer_of(f"The answer is {label}.", form) == label
        assert answer_of(f'Answer: "{label.lower()}".', form) == label
    assert reason_of("The answer is C++, which is fast.", form) == NO_CHOICE
    assert reason_of("The answer is Java or C++.", form) == TWO_ANSWERS
    assert answer_of("The answer is Java, which is slow.", form) == "Java"


def test_labels_without_a_word_are_taken_only_as_they_are_spelt():
    form = AnswerForm("label", ("<", ">", "equal"))
    for label in form.labels:
        assert answer_of(f"The answer is {label}.", form) == label
    assert reason_of("The answer is ?!.", form) == NO_CHOICE


def test_open_text_is_what_stands_behind_the_mark():
    assert answer_of("The answer is 'in Paris'.\nIndeed.", TEXT) == "in Paris"
    assert reason_of("The answer is .", TEXT) == NO_ANSWER


def test_empty_completions_and_rationales_are_rejected():
    assert parse_completion("", NLI).reason == NO_ANSWER
    assert parse_completion("Q: x\nA: Why. The answer is neutral.", NLI).reason == NO_ANSWER
    assert parse_completion("The answer is neutral.", NLI).reason == EMPTY_RATIONALE
    assert parse_completion("A: So the answer is neutral.", NLI).reason == EMPTY_RATIONALE


def test_rationale_loses_its_opening_and_its_white_space_but_not_its_asterisks():
    parsed = parse_completion("Explanation:  **Two** by\n 3 is `2 * 3`. Answer: 2 * 3", EQUATION)
    assert parsed.rationale == "Two by 3 is 2 * 3."


def example(dataset, text, form="text"):
    return Example("x", dataset, "train", text, answer_form=form)


def test_answer_form_is_declared_by_the_dataset_or_seen_in_the_example():
    listed = "Where?\nAnswer Choices:\n(a) ice\n(b) a (c) b"
    assert answer_form(example("anli1", listed)) == NLI
    assert answer_form(example("mine", listed)) == CHOICE
    assert answer_form(example("mine", "1 + 1", "equation")) == EQUATION
    assert answer_form(example("mine", "Why?")) == TEXT
    assert choices_of(example("mine", listed)) == ["ice", "a (c) b"]
    assert choices_of(example("mine", "(a) ice")) == []


@pytest.mark.parametrize("form", [CHOICE, NLI, EQUATION, TEXT])
def test_no_text_breaks_the_parser(form):
    for text in ("\x00", "Answer:" * 500, "(" * 5000, "the answer is " + "(" * 5000,
                 "answer: " + "1 and " * 2000, json.dumps({"answer": "x"}), "*" * 3000,
                 "answer: " + "a b " * 3000):  # fmt: skip
        parsed = parse_completion(text, form, CHOICES)
        if parsed.reason is None:  # used: only where there is something to use
            assert parsed.rationale.strip() and parsed.answer.strip()
        else:
            assert parsed.reason in REASONS
            assert parsed.rationale is None and parsed.answer is None


@pytest.mark.parametrize(
    "completion",
    [
        '{"rationale": "Why.", "answer": "neutral"}',
        '```json\n{"Explanation": "Why.", "label": "Neutral."}\n```',
        'Why.\n{"answer": "neutral", "confidence": 0.5}',
        "<think>Is it? So the answer is entailment.</think>\nWhy. So the answer is neutral.",
        "Hm, the answer is entailment.</think>Why. So the answer is neutral.",
        "Why. The final answer is $\\boxed{neutral}$.",
        "Why.\n\n**Answer**: *neutral*",
        "Why.\n### Final answer: neutral",
    ],
)
def test_answers_in_json_behind_thoughts_and_in_boxes(completion):
    parsed = parse_completion(completion, NLI)
    assert (parsed.answer, parsed.reason) == ("neutral", None)
    assert parsed.rationale.removesuffix(" ###") == "Why."


def test_numbers_in_json_are_answers():
    parsed = parse_completion('{"reasoning": "Two and two.", "answer": 4}', EQUATION)
    assert parsed == Parsed("Two and two.", "4", None)


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ('{"rationale": "Why.", "answer": "maybe"}', NO_CHOICE),
        ('{"rationale": "Why.", "answer": ["neutral"]}', NO_ANSWER),
        ('{"answer": "neutral"}', EMPTY_RATIONALE),
        ("<think>The answer is neutral.", NO_ANSWER),
    ],
)
def test_what_json_and_thoughts_do_not_say(completion, reason):
    assert parse_completion(completion, NLI).reason == reason


def test_where_an_answer_stands_alone_the_thought_before_it_is_the_rationale():
    alone = "So the answer is neutral."
    assert parse_completion(f"<think>\nBecause.\n</think>{alone}", NLI).rationale == "Because."
    parsed = parse_completion(alone, NLI, reasoning=" Because  so. ")
    assert parsed == Parsed("Because so.", "neutral", None)
    spoken = parse_completion(f"Why. {alone}", NLI, reasoning="Because.")
    assert spoken.rationale == "Why."


def test_why_the_teacher_stopped_tells_something():
    assert parse_completion("Dogs bark.", NLI, finish_reason="length").reason == TRUNCATED
    assert parse_completion("Dogs bark", NLI, finish_reason="stop").reason == NO_ANSWER
    filtered = parse_completion("", NLI, finish_reason="content_filter")
    assert filtered.reason == "content filter"


def test_half_a_character_in_a_json_answer_is_no_answer():
    parsed = parse_completion('{"rationale": "so \\ud800", "answer": "yes"}', TEXT)
    assert parsed.answer is None
    parsed = parse_completion('{"rationale": "\\ud83d\\ude00", "answer": "yes"}', TEXT)
    assert (parsed.rationale, parsed.answer) == ("😀", "yes")
