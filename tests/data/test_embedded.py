import collections
import re

import pytest

from dslt.data.embedded import COLOURS, FAMILIES, NAMES, NLI_LABELS, OBJECTS, generate
from dslt.errors import InputError
from dslt.metrics import evaluate_equation
from dslt.teacher.scripted import complete

FACT = re.compile(r"(\w+) has a (\w+) (\w+) \.")


def read_facts(example):
    """(name, object) → colour of the facts, and the hypothesis's three words."""
    premise, hypothesis = example.input.split(" hypothesis: ")
    (claim,) = FACT.findall(hypothesis)
    return {(name, thing): colour for name, colour, thing in FACT.findall(premise)}, claim


def majority_accuracy(examples, feature):
    """How often the commonest train label of a feature's value is the test label."""
    labels = collections.defaultdict(collections.Counter)
    for example in examples:
        if example.split == "train":
            labels[feature(example)][example.label] += 1
    test = [example for example in examples if example.split == "test"]
    guesses = [labels.get(feature(example), collections.Counter("?")) for example in test]
    hits = [
        guess.most_common(1)[0][0] == example.label
        for guess, example in zip(guesses, test, strict=True)
    ]
    return sum(hits) / len(hits)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_seed_gives_the_same_problems_and_another_seed_others(family):
    sizes = dict(train=50, validation=10, test=10)
    first = generate(family, **sizes, seed=1)
    assert first == generate(family, **sizes, seed=1)
    inputs = {example.input for example in first}
    assert len(inputs & {e.input for e in generate(family, **sizes, seed=2)}) < 20


@pytest.mark.parametrize("family", FAMILIES)
def test_no_problem_occurs_twice_and_splits_have_the_sizes_asked_for(family):
    examples = generate(family, train=2000, validation=150, test=150, seed=0)
    assert collections.Counter(e.split for e in examples) == {
        "train": 2000, "validation": 150, "test": 150,
    }  # fmt: skip
    assert len({e.input for e in examples}) == len({e.id for e in examples}) == 2300
    assert all(e.label and e.rationale is None and e.teacher_label is None for e in examples)


@pytest.mark.parametrize("family", FAMILIES)
def test_test_split_does_not_depend_on_the_others_and_train_is_a_beginning(family):
    large = generate(family, train=300, validation=20, test=30, seed=4)
    small = generate(family, train=100, validation=20, test=30, seed=4)
    assert [e for e in large if e.split == "test"] == [e for e in small if e.split == "test"]
    assert [e for e in large if e.split == "train"][:100] == [
        e for e in small if e.split == "train"
    ]
    without = generate(family, train=0, validation=0, test=30, seed=4)
    assert without == [e for e in large if e.split == "test"]


def test_vocabulary_of_all_families_with_their_explanations_stays_below_300_words():
    words = set()
    for family in FAMILIES:
        for example in generate(family, train=4000, validation=200, test=200, seed=0):
            texts = (example.input, example.label, complete(example))
            words.update(word for text in texts for word in text.split())
    words = {word.strip("().") for word in words}  # a completion's last sentence joins them
    assert 200 < len(words) < 300


@pytest.mark.parametrize("facts", [1, 3, 4])
def test_label_of_a_fact_problem_follows_from_its_facts(facts):
    examples = generate("facts", train=900, validation=0, test=0, seed=0, facts=facts)
    for example in examples:
        stated, (name, colour, thing) = read_facts(example)
        assert len(stated) == facts  # no name has the same object twice
        said = stated.get((name, thing))
        expected = {None: "neutral", colour: "entailment"}.get(said, "contradiction")
        assert example.label == expected
    assert collections.Counter(e.label for e in examples) == dict.fromkeys(NLI_LABELS, 300)


def test_hypothesis_alone_does_not_give_the_label_away():
    examples = generate("facts", train=12000, validation=0, test=3000, seed=0)
    # Chance is 1/3; over 3,000 rows its standard error is 0.009, and four of them are allowed.
    for words in ((0,), (1,), (2,), (0, 2), (0, 1, 2)):
        share = majority_accuracy(
            examples, lambda e, words=words: tuple(read_facts(e)[1][i] for i in words)
        )
        assert abs(share - 1 / 3) < 0.035
    assert {read_facts(e)[1][0] for e in examples} == set(NAMES)
    assert {read_facts(e)[1][1] for e in examples} == set(COLOURS)
    assert {read_facts(e)[1][2] for e in examples} == set(OBJECTS)


def test_which_words_occur_does_not_decide_a_fact_problem():
    examples = generate("facts", train=12000, validation=0, test=3000, seed=0)

    def words_in_common(example):
        premise, hypothesis = example.input.removeprefix("premise: ").split(" hypothesis: ")
        name, _, _, colour, thing, _ = hypothesis.split()
        return tuple(word in premise.split() for word in (name, colour, thing))

    assert 0.7 < majority_accuracy(examples, words_in_common) < 0.9  # measured: 0.86


def test_choice_tests_what_train_never_asked_of_that_animal():
    examples = generate("choice", train=4000, validation=300, test=300, seed=0)
    asked = collections.defaultdict(set)
    for example in examples:
        question, heading, *choices = example.input.split("\n")
        assert heading == "Answer Choices:"
        assert [c[:4] for c in choices] == ["(a) ", "(b) ", "(c) ", "(d) "]
        assert example.label in [choice[4:] for choice in choices]
        asked[example.split].add(question)
    assert len(asked["train"]) == 72
    assert len(asked["test"]) == len(asked["validation"]) == 24
    assert not asked["train"] & (asked["test"] | asked["validation"])


def test_position_of_the_right_choice_is_no_clue():
    examples = generate("choice", train=4000, validation=0, test=0, seed=0)
    places = collections.Counter(e.input.split("\n")[2:].index(_line(e)) for e in examples)
    # A quarter each; the standard error over 4,000 rows is 0.007.
    assert all(abs(places[place] / 4000 - 0.25) < 0.03 for place in range(4))


def _line(example):
    return next(line for line in example.input.split("\n")[2:] if line[4:] == example.label)


def test_sums_are_equations_of_the_numbers_in_the_story():
    for example in generate("sums", train=600, validation=0, test=0, seed=0):
        value = evaluate_equation(example.label)
        assert value is not None and value > 0 and value == int(value)
        numbers = re.findall(r"\d+", example.label)
        assert sorted(numbers) == sorted(re.findall(r"\d+", example.input))
        assert example.answer_form == "equation"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(family="riddles", train=1), "family is 'riddles'; expected one of facts"),
        (dict(family="facts", train=-1), "train is -1 examples"),
        (dict(family="facts", train=1, facts=0), "facts is 0"),
        (dict(family="choice", train=0, test=6000), "hardly more than"),
    ],
)
def test_impossible_requests_are_refused(arguments, says):
    arguments = {"validation": 0, "test": 0, **arguments}
    with pytest.raises(InputError, match=re.escape(says)):
        generate(**arguments, seed=0)
