"""A teacher for the embedded problems: reads a problem's text and answers as a large model would.

May import dslt.records and dslt.errors. It sees the input alone, never the gold label, and what it
knows of animals is its own: a test holds it against the problems.

    complete(example)
    # "ann has a red ball . red is not blue . So the answer is contradiction."
    complete(example, wording=1)
    # "what ann has is red and a ball . blue would be wrong . So the answer is contradiction."
"""

import random
import re

from dslt.errors import InputError
from dslt.records import Example

_FACT = re.compile(r"(\w+) has a (\w+) (\w+) \.")
_CHOICE_LINE = re.compile(r"^\(([a-z])\) (.*)$", re.MULTILINE)

KIND_OF = {
    "robin": "bird", "crow": "bird", "wren": "bird", "finch": "bird",
    "trout": "fish", "carp": "fish", "cod": "fish", "pike": "fish",
    "lion": "cat", "tiger": "cat", "lynx": "cat", "puma": "cat",
    "cobra": "snake", "boa": "snake", "viper": "snake", "python": "snake",
    "bee": "bug", "moth": "bug", "wasp": "bug", "beetle": "bug",
    "caribou": "deer", "moose": "deer", "roe": "deer", "stag": "deer",
}  # fmt: skip
# A question's pattern, what is said of a kind, and each kind's answer.
KNOWLEDGE = (
    (re.compile(r"where does a (\w+) sleep \?"), "a {} sleeps in a {} .",
     {"bird": "nest", "fish": "lake", "cat": "cave", "snake": "hole", "bug": "leaf",
      "deer": "forest"}),
    (re.compile(r"what covers a (\w+) \?"), "a {} is covered by {} .",
     {"bird": "feathers", "fish": "scales", "cat": "fur", "snake": "skin", "bug": "shell",
      "deer": "hair"}),
    (re.compile(r"what does a (\w+) eat \?"), "a {} eats {} .",
     {"bird": "seeds", "fish": "weed", "cat": "meat", "snake": "eggs", "bug": "sugar",
      "deer": "grass"}),
    (re.compile(r"how does a (\w+) move \?"), "a {} {} .",
     {"bird": "flies", "fish": "swims", "cat": "stalks", "snake": "slides", "bug": "crawls",
      "deer": "trots"}),
)  # fmt: skip
# A story's pattern, its explanation and its equation; `{0}` is the first named or numbered thing.
# The mistaken pair of each takes the opposite operation, so its value always differs.
STORIES = (
    (re.compile(r"(\w+) had (\d+) (\w+) \. \1 gave (\d+) \3 to \w+ \."),
     ("{0} had {1} {2} and gave {3} . now there are fewer , {1} minus {3} .", "({1} - {3})"),
     ("{0} had {1} {2} and gave {3} . now there are more , {1} plus {3} .", "({1} + {3})")),
    (re.compile(r"(\w+) has (\d+) (\w+) \. \1 gave (\d+) \3 to \w+ \."),
     ("{0} has {1} {2} and gave {3} . before there were more , {1} plus {3} .", "({1} + {3})"),
     ("{0} has {1} {2} and gave {3} . before there were fewer , {1} minus {3} .", "({1} - {3})")),
    (re.compile(r"(\w+) had (\d+) (\w+) \. \w+ gave \1 (\d+) \3 \."),
     ("{0} had {1} {2} and got {3} . now there are more , {1} plus {3} .", "({1} + {3})"),
     ("{0} had {1} {2} and got {3} . now there are fewer , {1} minus {3} .", "({1} - {3})")),
    (re.compile(r"(\w+) has (\d+) boxes \. each box holds (\d+) (\w+) \."),
     ("there are {1} boxes of {2} {3} . that is {1} times {2} .", "({1} * {2})"),
     ("there are {1} boxes of {2} {3} . that is {1} divided by {2} .", "({1} / {2})")),
    (re.compile(r"(\w+) has (\d+) (\w+) \. \1 puts (\d+) \3 in each box \."),
     ("there are {1} {2} , {3} in each box . that is {1} divided by {3} .", "({1} / {3})"),
     ("there are {1} {2} , {3} in each box . that is {1} times {3} .", "({1} * {3})")),
    (re.compile(r"(\w+) had (\d+) (\w+) \. \1 gave (\d+) \3 to \w+ and got (\d+) \."),
     ("{0} had {1} {2} , gave {3} and got {4} . first there are fewer , then more , "
      "{1} minus {3} plus {4} .", "(({1} - {3}) + {4})"),
     ("{0} had {1} {2} , gave {3} and got {4} . first there are more , then more , "
      "{1} plus {3} plus {4} .", "(({1} + {3}) + {4})")),
)  # fmt: skip
_OPERATORS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
WORDINGS = 2


def complete(
    example: Example, *, mistake_rate: float = 0.0, seed: int = 0, wording: int = 0
) -> str:
    """Explains and answers one problem of the families `facts`, `choice` and `sums`.

    Args:
      example: its dataset is the family.
      mistake_rate: the share of problems, in [0, 1], that it misreads: the answer is wrong, and
        the explanation leads to it.
      seed: which problems those are; with the example's id and the wording it decides alone, in
        any order.
      wording: how it explains; of two kinds, which have few words in common and alternate.

    Raises:
      InputError: for another dataset, a rate outside [0, 1], or a text that is no such problem.
    """
    explainers = {"facts": _explain_facts, "choice": _explain_choice, "sums": _explain_sums}
    if example.dataset not in explainers:
        raise InputError(
            f"the scripted teacher does not know dataset {example.dataset!r} (example "
            f"{example.id}); it explains {', '.join(explainers)}, the embedded problems"
        )
    if not 0 <= mistake_rate <= 1:
        raise InputError(f"mistake_rate is {mistake_rate}; expected a share from 0 to 1")
    wording %= WORDINGS
    rng = random.Random(f"{seed} {wording} {example.id}" if wording else f"{seed} {example.id}")
    is_mistaken = rng.random() < mistake_rate
    completion = explainers[example.dataset](example.input, is_mistaken, rng, wording)
    if completion is None:
        raise InputError(
            f"the scripted teacher cannot read example {example.id}: {example.input!r} is no "
            f"problem of the family {example.dataset!r}"
        )
    return completion


def _explain_facts(text: str, is_mistaken: bool, rng: random.Random, wording: int) -> str | None:
    """Repeats the fact that matters, compares what differs first, and answers."""
    premise, _, hypothesis = text.partition(" hypothesis: ")
    facts, claims = _FACT.findall(premise), _FACT.findall(hypothesis)
    if not facts or len(claims) != 1:
        return None
    name, colour, thing = claims[0]
    stated = {who: (what, which) for who, what, which in facts}
    if name not in stated:
        return None
    what, which = stated[name]
    if is_mistaken:
        what, which = _misread((what, which), (colour, thing), rng)
    if which != thing:
        label = "neutral"
        compared = f"{which} is not {thing} .", f"of a {thing} nothing is said ."
    elif what != colour:
        label = "contradiction"
        compared = f"{what} is not {colour} .", f"{colour} would be wrong ."
    else:
        label = "entailment"
        compared = f"{what} is {colour} .", f"{colour} it is ."
    said = f"{name} has a {what} {which} .", f"what {name} has is {what} and a {which} ."
    return f"{said[wording]} {compared[wording]} So the answer is {label}."


def _misread(stated: tuple, claimed: tuple, rng: random.Random) -> tuple[str, str]:
    """The colour and the object of a fact as a careless reader has them: the label changes."""
    (what, which), (colour, thing) = stated, claimed
    if which != thing:  # neutral: taken for the claim itself, or for the object in its own colour
        return (colour, thing) if what == colour or rng.random() < 0.5 else (what, thing)
    if what != colour:
        return colour, which
    return rng.choice([word for word in ("red", "blue", "green") if word != what]), which


def _explain_choice(text: str, is_mistaken: bool, rng: random.Random, wording: int) -> str | None:
    """Says what kind of animal it is, then what holds of the kind."""
    listed = [(letter, answer) for letter, answer in _CHOICE_LINE.findall(text)]
    for pattern, saying, answer_of_kind in KNOWLEDGE:
        asked = pattern.match(text)
        if not asked or asked[1] not in KIND_OF:
            continue
        kind = KIND_OF[asked[1]]
        if is_mistaken:
            answers = {answer for _, answer in listed}
            wrong = [k for k, a in answer_of_kind.items() if a in answers and k != kind]
            if not wrong:
                return None
            kind = rng.choice(wrong)
        answer = answer_of_kind[kind]
        letter = next((letter for letter, choice in listed if choice == answer), None)
        if letter:
            said = (
                f"a {asked[1]} is a {kind} . {saying.format(kind, answer)}",
                f"this is about a {kind} , so look for {answer} .",
            )
            return f"{said[wording]} So the answer is ({letter}) {answer}."
    return None


def _explain_sums(text: str, is_mistaken: bool, rng: random.Random, wording: int) -> str | None:
    """Says whether there are more or fewer, which operation that is, and the equation; or names
    the numbers, then the operations between them."""
    for pattern, right, wrong in STORIES:
        story = pattern.match(text)
        if story:
            said, equation = wrong if is_mistaken else right
            values = story.groups()
            equation = equation.format(*values)
            if wording == 1:
                numbers, operators = re.findall(r"\d+", equation), re.findall(r"[-+*/]", equation)
                words = " , then ".join(_OPERATORS[operator] for operator in operators)
                said = f"the numbers are {' and '.join(numbers)} . it is {words} ."
            return f"{said.format(*values)} The answer is {equation}."
    return None
