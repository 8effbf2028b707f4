import dataclasses

import pytest

from dslt.data import embedded
from dslt.errors import InputError
from dslt.metrics import is_correct
from dslt.records import Example
from dslt.teacher.parse import answer_form, choices_of, parse_completion
from dslt.teacher.scripted import complete


def make(family, count=300, seed=3):
    return embedded.generate(family, train=count, validation=0, test=60, seed=seed)


def parse(example, **options):
    completion = complete(example, **options)
    return parse_completion(completion, answer_form(example), choices_of(example))


def is_right(example, **options):
    parsed = parse(example, **options)
    assert parsed.reason is None
    return is_correct(parsed.answer, example.label, example.answer_form)


@pytest.mark.parametrize("family", embedded.FAMILIES)
def test_teacher_is_always_right_and_always_explains(family):
    assert all(is_right(example) for example in make(family))


@pytest.mark.parametrize("family", embedded.FAMILIES)
def test_its_right_answer_is_spelt_as_the_gold_label(family):
    assert all(parse(example).answer == example.label for example in make(family))


@pytest.mark.parametrize("family", embedded.FAMILIES)
def test_it_reads_the_problem_and_not_the_label(family):
    for example in make(family, 50):
        assert complete(dataclasses.replace(example, label=None)) == complete(example)


def problem(dataset, text):
    return Example("x", dataset, "train", text)


def test_explanations_repeat_what_matters_and_compare():
    premise = "premise: ann has a red ball . bob has a blue hat . hypothesis:"
    assert complete(problem("facts", f"{premise} ann has a blue ball .")) == (
        "ann has a red ball . red is not blue . So the answer is contradiction."
    )
    assert complete(problem("facts", f"{premise} bob has a blue hat .")) == (
        "bob has a blue hat . blue is blue . So the answer is entailment."
    )
    assert complete(problem("facts", f"{premise} ann has a blue hat .")) == (
        "ann has a red ball . ball is not hat . So the answer is neutral."
    )
    assert (
        complete(
            problem(
                "choice", "what covers a carp ?\nAnswer Choices:\n(a) fur\n(b) scales\n(c) skin"
            )
        )
        == "a carp is a fish . a fish is covered by scales . So the answer is (b) scales."
    )
    assert (
        complete(problem("sums", "ann had 7 cups . ann gave 3 cups to bob . how many are left ?"))
        == "ann had 7 cups and gave 3 . now there are fewer , 7 minus 3 . The answer is (7 - 3)."
    )


def test_the_other_wording_explains_the_same_in_other_words():
    premise = "premise: ann has a red ball . bob has a blue hat . hypothesis:"
    assert complete(problem("facts", f"{premise} ann has a blue ball ."), wording=1) == (
        "what ann has is red and a ball . blue would be wrong . So the answer is contradiction."
    )
    lamps = "ann had 7 lamps . ann gave 3 lamps to bob and got 9 . how many lamps now ?"
    assert complete(problem("sums", lamps), wording=1) == (
        "the numbers are 7 and 3 and 9 . it is minus , then plus . The answer is ((7 - 3) + 9)."
    )


@pytest.mark.parametrize("family", embedded.FAMILIES)
def test_wordings_alternate_and_err_on_other_problems(family):
    examples = make(family)
    for example in examples:
        first, second = parse(example), parse(example, wording=1)
        assert first.answer == second.answer
        assert first.rationale != second.rationale
        assert parse(example, wording=2) == first
    wrong = [
        {e.id for e in examples if not is_right(e, mistake_rate=0.3, wording=wording)}
        for wording in (0, 1)
    ]
    assert wrong[0] & wrong[1]
    assert wrong[0] - wrong[1]


@pytest.mark.parametrize("family", embedded.FAMILIES)
def test_mistakes_are_legal_wrong_answers_with_an_explanation(family):
    for example in make(family):
        assert not is_right(example, mistake_rate=1.0)
        assert complete(example, mistake_rate=1.0) != complete(example)


def test_mistaken_explanation_leads_to_the_mistaken_answer():
    for example in make("facts"):
        parsed = parse(example, mistake_rate=1.0)
        expected = "contradiction" if " is not " in parsed.rationale else "entailment"
        expected = "neutral" if "nothing says" in parsed.rationale else expected
        assert parsed.answer == expected
    for example in make("choice"):
        parsed = parse(example, mistake_rate=1.0)
        assert parsed.answer in parsed.rationale
    words = {"+": "plus", "-": "minus", "*": "times", "/": "divided"}
    for example in make("sums"):
        parsed = parse(example, mistake_rate=1.0)
        operators = [words[token] for token in parsed.answer.split() if token in words]
        assert operators == [word for word in parsed.rationale.split() if word in words.values()]


@pytest.mark.parametrize("family", embedded.FAMILIES)
def test_mistake_rate_is_the_share_of_wrong_answers(family):
    examples = make(family, 2000)
    share = sum(not is_right(e, mistake_rate=0.2, seed=1) for e in examples) / len(examples)
    assert abs(share - 0.2) < 0.036  # four standard errors over 2,060 rows


def test_mistakes_depend_on_seed_and_id_alone():
    examples = make("facts", 200)
    first = [complete(e, mistake_rate=0.5, seed=1) for e in examples]
    backwards = [complete(e, mistake_rate=0.5, seed=1) for e in reversed(examples)]
    assert first == backwards[::-1]
    assert first != [complete(e, mistake_rate=0.5, seed=2) for e in examples]
    # A higher rate keeps the mistakes of a lower one.
    wrong = {e.id for e in examples if not is_right(e, mistake_rate=0.2)}
    assert wrong < {e.id for e in examples if not is_right(e, mistake_rate=0.5)}


@pytest.mark.parametrize(
    ("example", "options", "says"),
    [
        (problem("svamp", "x"), {}, "does not know dataset 'svamp'"),
        (problem("facts", "x"), {}, "is no problem of the family 'facts'"),
        (problem("choice", "what covers a dog ?\nAnswer Choices:\n(a) fur"), {}, "cannot read"),
        (
            problem("choice", "what covers a crow ?\nAnswer Choices:\n(a) feathers\n(b) paper"),
            {"mistake_rate": 1.0},
            "cannot read",
        ),
        (problem("sums", "ann had 7 cups ."), {}, "cannot read example x"),
        (problem("facts", "x"), {"mistake_rate": 1.5}, "mistake_rate is 1.5"),
    ],
)
def test_what_it_cannot_explain_is_an_error(example, options, says):
    with pytest.raises(InputError) as caught:
        complete(example, **options)
    assert says in str(caught.value)
