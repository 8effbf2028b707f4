"""A teacher's completion → its explanation and a legal answer, or the reason why there is none.

May import dslt.records and dslt.metrics. Each kind of dataset has one declared answer form; what
follows is read leniently (case, punctuation, white space, Markdown), what is legal is not.

    parse_completion("Only water is wet. So the answer is (b) water.", CHOICE, ["sand", "water"])
    # Parsed(rationale="Only water is wet.", answer="water", reason=None)
"""

import dataclasses
import difflib
import re
from collections.abc import Sequence

from dslt.metrics import evaluate_equation, is_correct, normalize_equation, normalize_text
from dslt.records import Example

NO_ANSWER = "no answer"
TRUNCATED = "truncated"
TWO_ANSWERS = "two answers"
NO_CHOICE = "answer is no choice"
NO_EQUATION = "not an equation"
EMPTY_RATIONALE = "empty rationale"
REASONS = (NO_ANSWER, TRUNCATED, TWO_ANSWERS, NO_CHOICE, NO_EQUATION, EMPTY_RATIONALE)

NLI_LABELS = ("entailment", "neutral", "contradiction")

# A choice is taken by its letter alone only if the text beside it nearly spells that choice. In
# the paper's 10,962 CQA completions 21 texts are that near (`field` for the choice `feild`); of the
# 16 that are further off, the letter's choice was right 3 times: the teacher answered something
# that was not asked.
NEAR_SPELLING = 0.8

# The answer begins behind the last of these; `The answer must be a place ...` is none of them.
_ANSWER_MARK = re.compile(
    r"(?:\b(?:so|thus|hence|therefore)\b,?\s+)?(?:\b(?:the|my)\s+)?"
    r"(?:\b(?:final|correct|right|best)\s+)?\banswer(?:\s+is\b\s*:?|\s*:)",
    re.IGNORECASE,
)
# A completion runs on into an exemplar of its own making; what begins a line like this ends it.
_NEXT_EXEMPLAR = re.compile(r"^\s*(?:Q|Question|Premise|Problem)\s*:", re.MULTILINE)
_OPENING = re.compile(r"^\s*(?:A|Answer|Explanation|Rationale|Reasoning)\s*:\s*", re.IGNORECASE)
_BOLD = re.compile(r"(?<![\w*])\*\*(?=\S)(.+?)(?<=\S)\*\*(?![\w*])")
_CHOICE_LINE = re.compile(r"^\(([a-z])\) (.*)$", re.MULTILINE)
_CHOICES_HEADING = "Answer Choices:"
_LETTER = re.compile(r"\(([a-z])\)|\b([a-z])\)|^([a-z])(?=[.:]|$)")
_SENTENCE_END = (".", "!", "?", ")", '"')
_QUOTES = " \t*_\"'“”:"
_UNIT = re.compile(r"[A-Za-z][A-Za-z' -]+")


@dataclasses.dataclass(frozen=True)
class AnswerForm:
    """What a legal answer is.

    Attributes:
      kind: `choice` (one of the example's own choices, `(d) math problem`), `label` (one of
        `labels`), `equation` (arithmetic with a value) or `text` (anything that is not empty).
      labels: the label set of kind `label`.
    """

    kind: str
    labels: tuple[str, ...] = ()

    def __post_init__(self):
        if self.kind not in ("choice", "label", "equation", "text"):
            raise ValueError(f"kind is {self.kind!r}; expected choice, label, equation or text")
        if (self.kind == "label") != bool(self.labels):
            raise ValueError(f"kind {self.kind!r} has labels {self.labels}; only `label` has some")


CHOICE = AnswerForm("choice")
NLI = AnswerForm("label", NLI_LABELS)
EQUATION = AnswerForm("equation")
TEXT = AnswerForm("text")

FORM_BY_DATASET = {
    "esnli": NLI, "anli1": NLI, "facts": NLI,
    "cqa": CHOICE, "choice": CHOICE,
    "svamp": EQUATION, "sums": EQUATION,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Parsed:
    """One completion, read: an explanation and an answer, or a reason why it is not used.

    Attributes:
      rationale: the text before the answer, white space collapsed; None with a reason.
      answer: the legal answer, spelt as the choice, the label or `normalize_equation` spells it;
        None with a reason.
      reason: one of REASONS, or None.
    """

    rationale: str | None
    answer: str | None
    reason: str | None


def answer_form(example: Example) -> AnswerForm:
    """The declared form of the example's dataset; else what the example itself shows.

    A dataset that is not in FORM_BY_DATASET has equations where its `answer_form` says so, choices
    where its input lists them, and open text otherwise.
    """
    if example.dataset in FORM_BY_DATASET:
        return FORM_BY_DATASET[example.dataset]
    if example.answer_form == "equation":
        return EQUATION
    return CHOICE if choices_of(example) else TEXT


def choices_of(example: Example) -> list[str]:
    """The choices' texts that the example's input lists (see `choices_in`)."""
    return choices_in(example.input)


def choices_in(text: str) -> list[str]:
    """The choices' texts that a problem lists below `Answer Choices:`, in order; [] if none."""
    _, _, listed = text.partition(_CHOICES_HEADING)
    return [text.strip() for _, text in _CHOICE_LINE.findall(listed)]


def parse_completion(completion: str, form: AnswerForm, choices: Sequence[str] = ()) -> Parsed:
    """Reads one completion.

    The completion ends where the next exemplar begins. Its answer stands behind the last mark
    (`So the answer is`, `The answer is`, `Answer:`). A legal answer behind an earlier mark that
    differs from it makes two answers, and so do two legal answers behind one mark: a teacher that
    did not decide teaches nothing, and is rejected.

    Args:
      completion: the raw text.
      form: what is legal.
      choices: the texts of the choices (a), (b), ...; for kind `choice`.
    """
    text, is_cut = cut_at_next_exemplar(completion)
    marks = list(_ANSWER_MARK.finditer(text))
    if not marks:
        is_whole = is_cut or text.endswith(_SENTENCE_END) or not text
        return Parsed(None, None, NO_ANSWER if is_whole else TRUNCATED)
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    answers = [
        _legal_answer(text[mark.end() : end], form, choices)
        for mark, end in zip(marks, ends, strict=True)
    ]
    answer, reason = answers[-1]
    if reason in (NO_ANSWER, NO_CHOICE, NO_EQUATION) and not is_cut:
        reason = reason if text.endswith(_SENTENCE_END) else TRUNCATED
    earlier = [found for found, _ in answers[:-1] if found is not None]
    if any(not is_correct(found, answer, _compared_as(form)) for found in earlier if answer):
        reason = TWO_ANSWERS
    rationale = _OPENING.sub("", text[: marks[-1].start()])
    rationale = " ".join(rationale.split())
    if reason is None and not rationale:
        reason = EMPTY_RATIONALE
    return Parsed(None, None, reason) if reason else Parsed(rationale, answer, None)


def cut_at_next_exemplar(completion: str) -> tuple[str, bool]:
    """The text before a line that begins with `Q:` or `Premise:`, and whether there was one.

    Bold marks and backticks are taken off; the text is stripped.
    """
    text = _BOLD.sub(r"\1", completion.replace("`", ""))
    start = _NEXT_EXEMPLAR.search(text)
    return (text[: start.start()] if start else text).strip(), start is not None


def _compared_as(form: AnswerForm) -> str:
    return "equation" if form.kind == "equation" else "text"


def _legal_answer(
    text: str, form: AnswerForm, choices: Sequence[str]
) -> tuple[str | None, str | None]:
    """The legal answer that `text` begins with, and None; or None and the reason."""
    line = text.strip().partition("\n")[0].strip(_QUOTES)
    if not line.strip("."):
        return None, NO_ANSWER
    if form.kind == "choice":
        return _legal_choice(line, choices)
    if form.kind == "label":
        return _legal_label(line, form.labels)
    if form.kind == "equation":
        return _legal_equation(line)
    return line.removesuffix(".").rstrip(_QUOTES), None


def _legal_choice(line: str, choices: Sequence[str]) -> tuple[str | None, str | None]:
    """`(d) math problem.`: the text decides where it is a choice, else the letter if it is near.

    In the paper's CQA completions the two name different choices twice in 10,962: the text was
    right once, the letter never.
    """
    spelt = {normalize_text(choice): choice for choice in reversed(choices)}
    letters = [a or b or c for a, b, c in _LETTER.findall(line.lower())]
    named = {ord(letter) - ord("a") for letter in letters}
    named = {normalize_text(choices[index]) for index in named if index < len(choices)}
    if len(named) > 1:
        return None, TWO_ANSWERS
    rest = _LETTER.sub("", line.lower(), count=1).strip(" .:*_\"'")
    for candidate in (rest, rest.partition(". ")[0], line):
        if normalize_text(candidate) in spelt:
            return spelt[normalize_text(candidate)], None
    if len(letters) == 1 and named:
        (choice,) = named
        if not rest or _is_near(normalize_text(rest), choice):
            return spelt[choice], None
    return None, NO_CHOICE


def _is_near(text: str, choice: str) -> bool:
    return difflib.SequenceMatcher(None, text, choice).ratio() >= NEAR_SPELLING


def _legal_label(line: str, labels: Sequence[str]) -> tuple[str | None, str | None]:
    """The label that the line begins with, in its own spelling, if it names no other."""
    words = _bare_words(line)
    bare = {_bare_words(label): label for label in labels}
    found = [label for label in bare if re.search(rf"(?<!\S){re.escape(label)}(?!\S)", words)]
    longest = [label for label in found if not any(label in other != label for other in found)]
    if len(longest) > 1:
        return None, TWO_ANSWERS
    if longest and words.startswith(longest[0]):
        return bare[longest[0]], None
    return None, NO_CHOICE


def _bare_words(text: str) -> str:
    return " ".join(re.sub(r"[^\w-]+", " ", text.lower()).split())


def _legal_equation(line: str) -> tuple[str | None, str | None]:
    """`(84 / 2)`, also followed by its value (`84 / 2 = 42`), a unit or another sentence."""
    for candidate in (line, re.split(r"\.\s", line, maxsplit=1)[0]):
        sides = candidate.removesuffix(".").split("=")
        if all(is_correct(side, sides[0], "equation") for side in sides):
            return normalize_equation(sides[0]), None
        arithmetic = re.match(r"[-+*/()$,.\d\s]+", candidate)
        unit = candidate[arithmetic.end() :].rstrip(".") if arithmetic else ""
        if _UNIT.fullmatch(unit) and evaluate_equation(arithmetic[0]) is not None:
            return normalize_equation(arithmetic[0]), None
    parts = re.split(r"\s(?:and|or)\s", line)
    values = [evaluate_equation(part) for part in parts]
    return None, TWO_ANSWERS if len(parts) > 1 and None not in values else NO_EQUATION
