"""The embedded default: problems made here from a seed, in the manner of the paper's tasks.

May import the standard library, dslt.records and dslt.data.datasets. No file is needed. Three
families: `facts` (inference over stated facts, as e-SNLI and ANLI), `choice` (two steps of common
knowledge, as CQA) and `sums` (word problems answered by an equation, as SVAMP). Together they use
fewer than 300 words, so that a vocabulary of some hundred pieces holds them whole.

    generate("facts", train=2000, validation=200, test=200, seed=0)
"""

import functools
import random
from collections.abc import Callable

from dslt.data.datasets import NLI_LABELS, choice_input, nli_input
from dslt.errors import InputError
from dslt.records import Example

FAMILIES = ("facts", "choice", "sums")

NAMES = ("ann", "bob", "cleo", "dan", "eve", "finn", "gus", "hana", "ivan", "june")
COLOURS = ("red", "blue", "green", "black", "white", "pink", "brown", "grey")
OBJECTS = ("ball", "cup", "hat", "book", "lamp", "bag", "drum", "kite", "coat", "boat")

KINDS = {
    "bird": ("robin", "crow", "wren", "finch"),
    "fish": ("trout", "carp", "cod", "pike"),
    "cat": ("lion", "tiger", "lynx", "puma"),
    "snake": ("cobra", "boa", "viper", "python"),
    "bug": ("bee", "moth", "wasp", "beetle"),
    "deer": ("caribou", "moose", "roe", "stag"),
}
# What each kind answers to each question, in the order of KINDS.
QUESTIONS = {
    "where does a {} sleep ?": ("nest", "lake", "cave", "hole", "leaf", "forest"),
    "what covers a {} ?": ("feathers", "scales", "fur", "skin", "shell", "hair"),
    "what does a {} eat ?": ("seeds", "weed", "meat", "eggs", "sugar", "grass"),
    "how does a {} move ?": ("flies", "swims", "stalks", "slides", "crawls", "trots"),
}
CHOICES_PER_PROBLEM = 4

# A split that asks for more than the family has is told so after this many draws in a row.
_MAX_REPEATS = 2000


def generate(
    family: str, *, train: int, validation: int, test: int, seed: int, facts: int = 3
) -> list[Example]:
    """Makes the problems of one family with their gold labels, and without rationales.

    No input occurs twice, in one split or in two. The test split depends on the seed and its own
    size alone; a smaller train split is the beginning of a larger one.

    Args:
      family: one of FAMILIES; the examples' `dataset`.
      train, validation, test: examples a split; 0 leaves it out.
      seed: of the problems.
      facts: facts stated a problem; `facts` alone.

    Raises:
      InputError: for another family, a negative size, or more problems than there are.
    """
    if family not in FAMILIES:
        raise InputError(f"family is {family!r}; expected one of {', '.join(FAMILIES)}")
    if not 1 <= facts <= len(NAMES):
        raise InputError(f"facts is {facts}; expected 1 to {len(NAMES)} facts a problem")
    sizes = {"test": test, "validation": validation, "train": train}
    makers = {
        "facts": functools.partial(_make_facts, number_of_facts=facts),
        "choice": _make_choice,
        "sums": _make_sums,
    }
    seen: set[str] = set()
    by_split = {
        split: _make_split(makers[family], family, split, size, seed, seen)
        for split, size in sizes.items()
    }
    return by_split["train"] + by_split["validation"] + by_split["test"]


def _make_split(
    make: Callable, family: str, split: str, size: int, seed: int, seen: set[str]
) -> list[Example]:
    """Draws `size` problems whose input is not in `seen`, and adds them to it."""
    if size < 0:
        raise InputError(f"{split} is {size} examples; expected 0 or more")
    rng = random.Random(f"{family} {split} {seed}")
    examples = []
    for row in range(size):
        for _ in range(_MAX_REPEATS):
            text, label = make(rng, row, split)
            if text not in seen:
                break
        else:
            raise InputError(
                f"family {family!r} has hardly more than {row} different problems left for split "
                f"{split!r}, and {size} were asked for; ask for fewer, or take another family"
            )
        seen.add(text)
        examples.append(
            Example(
                id=f"{family}-{split}-{row}",
                dataset=family,
                split=split,
                input=text,
                label=label,
                answer_form="equation" if family == "sums" else "text",
            )
        )
    return examples


def _make_facts(
    rng: random.Random, row: int, split: str, *, number_of_facts: int
) -> tuple[str, str]:
    """`premise: ann has a red ball . ... hypothesis: ann has a blue ball .` and its label.

    The hypothesis is drawn before the label is looked at, so it says nothing about the label. Every
    fact is of another name, and the hypothesis is of one of them: that fact decides. A neutral
    problem states another object of that name. The other facts are drawn freely, so a word of the
    hypothesis may stand in them too, and which words occur does not decide all problems.
    """
    label = NLI_LABELS[row % len(NLI_LABELS)]
    names = rng.sample(NAMES, number_of_facts)
    colour, thing = rng.choice(COLOURS), rng.choice(OBJECTS)
    facts = [(name, rng.choice(COLOURS), rng.choice(OBJECTS)) for name in names]
    if label == "entailment":
        facts[0] = (names[0], colour, thing)
    elif label == "contradiction":
        facts[0] = (names[0], _other(rng, COLOURS, colour), thing)
    else:
        facts[0] = (names[0], rng.choice(COLOURS), _other(rng, OBJECTS, thing))
    rng.shuffle(facts)
    premise = " ".join(f"{who} has a {what} {which} ." for who, what, which in facts)
    return nli_input(premise, f"{names[0]} has a {colour} {thing} ."), label


def _make_choice(rng: random.Random, row: int, split: str) -> tuple[str, str]:
    """`what covers a crow ?` with four choices; the choice's text is the label.

    Each animal leaves one question to the validation and the test split: it is answered from what
    kind of animal it is and what was learned of its kind, not from memory.
    """
    asked = [
        (animal, kind, question)
        for kind, animals in enumerate(KINDS.values())
        for position, animal in enumerate(animals)
        for number, question in enumerate(QUESTIONS)
        if ((number + position + kind) % len(QUESTIONS) == 0) != (split == "train")
    ]
    animal, kind, question = rng.choice(asked)
    label = QUESTIONS[question][kind]
    others = [answer for answer in QUESTIONS[question] if answer != label]
    choices = [label, *rng.sample(others, CHOICES_PER_PROBLEM - 1)]
    rng.shuffle(choices)
    return choice_input(question.format(animal), choices), label


def _make_sums(rng: random.Random, row: int, split: str) -> tuple[str, str]:
    """A story with two or three numbers, its question, and the equation `( 7 - 3 )`.

    The first two stories begin alike and are told apart by the question, as SVAMP's are.
    """
    giver, taker = rng.sample(NAMES, 2)
    thing = rng.choice(OBJECTS) + "s"
    low, high = sorted(rng.sample(range(2, 21), 2))
    extra, each = rng.randint(2, 20), rng.randint(2, 9)
    story = row % 6
    if story == 0:
        text = f"{giver} had {high} {thing} . {giver} gave {low} {thing} to {taker} ."
        return f"{text} how many {thing} does {giver} have now ?", f"( {high} - {low} )"
    if story == 1:
        text = f"{giver} has {high} {thing} . {giver} gave {low} {thing} to {taker} ."
        return f"{text} how many {thing} did {giver} have before ?", f"( {high} + {low} )"
    if story == 2:
        text = f"{giver} had {low} {thing} . {taker} gave {giver} {extra} {thing} ."
        return f"{text} how many {thing} does {giver} have now ?", f"( {low} + {extra} )"
    if story == 3:
        text = f"{giver} has {low} boxes . each box holds {each} {thing} ."
        return f"{text} how many {thing} does {giver} have ?", f"( {low} * {each} )"
    if story == 4:
        text = f"{giver} has {low * each} {thing} . {giver} puts {each} {thing} in each box ."
        return f"{text} how many boxes does {giver} need ?", f"( {low * each} / {each} )"
    text = f"{giver} had {high} {thing} . {giver} gave {low} {thing} to {taker} and got {extra} ."
    return (
        f"{text} how many {thing} does {giver} have now ?",
        f"( ( {high} - {low} ) + {extra} )",
    )


def _other(rng: random.Random, words: tuple[str, ...], word: str) -> str:
    """One of `words`, never `word`."""
    return rng.choice([candidate for candidate in words if candidate != word])
