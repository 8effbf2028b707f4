"""A teacher's completion → its explanation and a legal answer, or the reason why there is none.

May import dslt.records and dslt.metrics. Each kind of dataset has one declared answer form; what
follows is read leniently (case, punctuation, white space, Markdown, `<think>` blocks, JSON), what
is legal is not.

    parse_completion("Only water is wet. So the answer is (b) water.", CHOICE, ["sand", "water"])
    # Parsed(rationale="Only water is wet.", answer="water", reason=None)
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Sequence

from dslt import strict_json
from dslt.metrics import evaluate_equation, is_correct, normalize_equation, normalize_text
from dslt.records import Example

CONTENT_FILTER = "content filter"
NO_ANSWER = "no answer"
TRUNCATED = "truncated"
TWO_ANSWERS = "two answers"
NO_CHOICE = "answer is no choice"
NO_EQUATION = "not an equation"
EMPTY_RATIONALE = "empty rationale"
UNPARSED = (CONTENT_FILTER, NO_ANSWER, TRUNCATED, EMPTY_RATIONALE)  # no answer is to be seen
ILLEGAL = (TWO_ANSWERS, NO_CHOICE, NO_EQUATION)  # an answer that is none of those allowed
REASONS = (*UNPARSED, *ILLEGAL)

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
_THOUGHT = re.compile(r"<(think|thinking|reasoning)>(.*?)(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_BOXED = re.compile(r"\$?\\boxed\{([^{}]*)\}\$?")
# What a JSON answer calls its parts, best first.
_ANSWER_KEYS = ("answer", "final_answer", "label", "choice")
_RATIONALE_KEYS = ("rationale", "explanation", "reasoning", "reason", "thought")
_OPENING = re.compile(r"^\s*(?:A|Answer|Explanation|Rationale|Reasoning)\s*:\s*", re.IGNORECASE)
_BOLD = re.compile(r"(?<![\w*])\*\*(?=\S)(.+?)(?<=\S)\*\*(?![\w*])")
_CHOICE_LINE = re.compile(r"^\(([a-z])\) (.*)$", re.MULTILINE)
_CHOICES_HEADING = "Answer Choices:"
_LETTER = re.compile(r"\(([a-z])\)|\b([a-z])\)|^([a-z])(?=[.:]|$)")
_SENTENCE_END = (".", "!", "?", ")", '"', "}")
_QUOTES = " \t*_\"'“”:"
_UNIT = re.compile(r"[A-Za-z][A-Za-z' -]+")
# With such a word behind it a number is another one, or is not all of it. (Quarters are coins too.)
_NUMBER_WORD = re.compile(
    r"\b(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
    r"|(?:thir|four|fif|six|seven|eigh|nine)teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty"
    r"|hundreds?|thousands?|(?:m|b|tr)illions?|dozens?|percent|per cent|half|halves|halved|thirds"
    r"|doubled|tripled|twice|squared|cubed|times|plus|minus|divided|multiplied|added|subtracted)\b",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class AnswerForm:
    """What a legal answer is.

    Attributes:
      kind: `choice` (one of the example's own choices, `(d) math problem`), `label` (one of
        `labels`), `equation` (arithmetic with a value) or `text` (anything that is not empty).
      labels: the label set of kind `label`.
      mark: the words behind which the answer starts, where they are none of the usual ones (`So the
        answer is`, `The answer is`, `Answer:`).
    """

    kind: str
    labels: tuple[str, ...] = ()
    mark: str = ""

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


def parse_completion(
    completion: str,
    form: AnswerForm,
    choices: Sequence[str] = (),
    *,
    reasoning: str | None = None,
    finish_reason: str | None = None,
) -> Parsed:
    """Reads one completion.

    The completion ends where the next exemplar begins. Its answer stands behind the last mark
    (`So the answer is`, `The answer is`, `Answer:`), or in a JSON object's `answer`. A legal answer
    behind an earlier mark that differs from it makes two answers, and so do two legal answers
    behind one mark: a teacher that did not decide teaches nothing, and is rejected. Where an answer
    stands alone, what was thought before it (`<think>` blocks, `reasoning`) is the rationale.

    Args:
      completion: the raw text.
      form: what is legal.
      choices: the texts of the choices (a), (b), ...; for kind `choice`.
      reasoning: what a reasoning model said beside its answer.
      finish_reason: why the teacher stopped; `length` and `content_filter` tell something.
    """
    if finish_reason == "content_filter":
        return Parsed(None, None, CONTENT_FILTER)
    visible, thought = split_thought(completion)
    text, is_cut = cut_at_next_exemplar(visible)
    is_whole = finish_reason == "stop" or (
        finish_reason != "length" and (is_cut or text.endswith(_SENTENCE_END) or not text)
    )
    rationale, found, reason = _read_json(text, form, choices) or _read_marks(text, form, choices)
    if reason in (NO_ANSWER, NO_CHOICE, NO_EQUATION) and not is_whole:
        reason = TRUNCATED
    if reason is None and not rationale:
        rationale = _collapse(reasoning or thought)
        reason = None if rationale else EMPTY_RATIONALE
    return Parsed(None, None, reason) if reason else Parsed(rationale, found, None)


def split_thought(completion: str) -> tuple[str, str]:
    """The completion without its `<think>` blocks, and what they hold; a block may lack its end."""
    thoughts = [match[2].strip() for match in _THOUGHT.finditer(completion)]
    visible = _THOUGHT.sub("", completion)
    before, end, after = visible.rpartition("</think>")  # templates put the opening in the prompt
    if end:
        thoughts.append(before.strip())
        visible = after
    return visible, " ".join(thoughts)


def same_answer(first: str, second: str, form: AnswerForm) -> bool:
    """Whether two legal answers are one: equations by value, other answers by their words."""
    return is_correct(first, second, _compared_as(form))


def _read_marks(
    text: str, form: AnswerForm, choices: Sequence[str]
) -> tuple[str, str | None, str | None]:
    """(rationale, answer, reason) by the words behind which the answer stands."""
    marks = list(_answer_mark(form.mark).finditer(text))
    if not marks:
        return "", None, NO_ANSWER
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    answers = [
        _legal_answer(text[mark.end() : end], form, choices)
        for mark, end in zip(marks, ends, strict=True)
    ]
    answer, reason = answers[-1]
    earlier = [found for found, _ in answers[:-1] if found is not None]
    if answer and any(not same_answer(found, answer, form) for found in earlier):
        reason = TWO_ANSWERS
    return _collapse(text[: marks[-1].start()]), answer, reason


def _read_json(
    text: str, form: AnswerForm, choices: Sequence[str]
) -> tuple[str, str | None, str | None] | None:
    """(rationale, answer, reason) of a completion that is or ends in a JSON object with an answer.

    The text before the object is the rationale where the object has none.
    """
    start, end = text.find("{"), text.rfind("}")
    if not 0 <= start < end:
        return None
    try:
        parts = strict_json.loads(text[start : end + 1])
    except ValueError:
        return None
    if not isinstance(parts, dict):
        return None
    parts = {str(key).lower(): value for key, value in parts.items()}
    answer = next((parts[key] for key in _ANSWER_KEYS if key in parts), None)
    if not isinstance(answer, (str, int, float)):
        return None
    said = next((parts[key] for key in _RATIONALE_KEYS if isinstance(parts.get(key), str)), "")
    before = re.sub(r"\bjson\s*$", "", text[:start], flags=re.IGNORECASE)  # of a code fence
    return (_collapse(said or before), *_legal_answer(str(answer), form, choices))


@functools.cache
def _answer_mark(mark: str) -> re.Pattern:
    """Where answers begin; a declared mark's words count in any case and spacing."""
    words = [re.escape(word) for word in mark.strip().rstrip(":").split()]
    if not words or _ANSWER_MARK.fullmatch(mark.strip()):
        return _ANSWER_MARK
    return re.compile(r"\s+".join(words) + r"\s*:?", re.IGNORECASE)


def _collapse(text: str) -> str:
    return " ".join(_OPENING.sub("", text).split())


def cut_at_next_exemplar(completion: str) -> tuple[str, bool]:
    """The text before a line that begins with `Q:` or `Premise:`, and whether there was one.

    Bold marks, backticks and LaTeX boxes are taken off; the text is stripped.
    """
    text = _BOXED.sub(r"\1", _BOLD.sub(r"\1", completion.replace("`", "")))
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
    rest = _LETTER.sub("", line.lower(), count=1).strip(" .:*_\"'")
    for candidate in (rest, line):  # all of it: `(a) vitamin (c)` is no two answers
        if normalize_text(candidate) in spelt:
            return spelt[normalize_text(candidate)], None
    letters = [a or b or c for a, b, c in _LETTER.findall(line.lower())]
    named = {ord(letter) - ord("a") for letter in letters}
    named = {normalize_text(choices[index]) for index in named if index < len(choices)}
    if len(named) > 1:
        return None, TWO_ANSWERS
    first = normalize_text(rest.partition(". ")[0])
    if first in spelt:
        return spelt[first], None
    if len(letters) == 1 and named:
        (choice,) = named
        if not rest or _is_near(normalize_text(rest), choice):
            return spelt[choice], None
    return None, NO_CHOICE


def _is_near(text: str, choice: str) -> bool:
    return difflib.SequenceMatcher(None, text, choice).ratio() >= NEAR_SPELLING


def _legal_label(line: str, labels: Sequence[str]) -> tuple[str | None, str | None]:
    """The label that the line is, or begins with, in its own spelling, if it names no other.

    Labels of the same words (`C`, `C++`), or of none (`<`), are taken only where one is all of it.
    """
    spelt = {normalize_text(label): label for label in labels}
    whole = normalize_text(line.removesuffix(".").rstrip(_QUOTES))
    if whole in spelt:
        return spelt[whole], None
    words = _bare_words(line)
    bare: dict[str, list[str]] = {}
    for label in spelt.values():
        bare.setdefault(_bare_words(label), []).append(label)
    found = [
        label for label in bare if label and re.search(rf"(?<!\S){re.escape(label)}(?!\S)", words)
    ]
    longest = [
        label
        for label in found
        if not any(f" {label} " in f" {other} " for other in found if other != label)
    ]
    if len(longest) > 1:
        return None, TWO_ANSWERS
    if longest and words.startswith(longest[0]) and len(bare[longest[0]]) == 1:
        return bare[longest[0]][0], None
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
        is_unit = _UNIT.fullmatch(unit) and not _NUMBER_WORD.search(unit)
        if is_unit and evaluate_equation(arithmetic[0]) is not None:
            return normalize_equation(arithmetic[0]), None
    parts = re.split(r"\s(?:and|or)\s", line)
    values = [evaluate_equation(part) for part in parts]
    return None, TWO_ANSWERS if len(parts) > 1 and None not in values else NO_EQUATION
