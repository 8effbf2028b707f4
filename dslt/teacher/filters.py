"""Which of a problem's answers become its teacher label and its rationales, and why others do not.

May import dslt.records and dslt.metrics. Every filter is an option.

    chosen = choose(example, candidates, FilterConfig(keep="gold", max_rationales=4))
    chosen.label, chosen.kept, chosen.reasons
"""

import dataclasses
from collections.abc import Sequence

from dslt.errors import InputError
from dslt.metrics import is_correct, normalize_text
from dslt.records import Example, Rationale
from dslt.teacher.parse import Parsed, same_answer
from dslt.teacher.questions import Teacher

NOT_MAJORITY = "not the majority answer"
NOT_GOLD = "not the gold answer"
NO_GOLD = "no gold label to compare with"
TOO_SHORT = "too short"
TOO_LONG = "too long"
REPEATS_QUESTION = "repeats the question"
NEAR_DUPLICATE = "near-duplicate"
TELLS_HINT = "speaks of the hint"
ENOUGH = "more than max_rationales"
FILTER_REASONS = (
    NOT_MAJORITY, NOT_GOLD, NO_GOLD, TOO_SHORT, TOO_LONG, REPEATS_QUESTION, NEAR_DUPLICATE,
    TELLS_HINT, ENOUGH,
)  # fmt: skip

KEEPS = ("legal", "majority", "gold")
SHINGLE_WORDS = 3


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """Which legal answers' explanations are kept.

    Attributes:
      keep: those of every `legal` answer, of the `majority` answer (the teacher label), or of the
        `gold` one.
      max_rationales: of one teacher an example.
      min_words, max_words: of a rationale; None: any.
      max_similarity: of two rationales of an example, in (0, 1]: the share of word triples that
        they have in common; from there on the later one is a near-duplicate. Equal ones always are.
      max_question_overlap: the share of a rationale's word triples that stand in the question, in
        (0, 1]; from there on it merely repeats the question. None: any.
    """

    keep: str = "majority"
    max_rationales: int = 1
    min_words: int | None = None
    max_words: int | None = None
    max_similarity: float = 1.0
    max_question_overlap: float | None = None

    def __post_init__(self):
        if self.keep not in KEEPS:
            raise InputError(f"keep is {self.keep!r}; expected one of {', '.join(KEEPS)}")
        if self.max_rationales < 1:
            raise InputError(f"max_rationales is {self.max_rationales}; expected 1 or more")
        for name in ("max_similarity", "max_question_overlap"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise InputError(f"{name} is {share}; expected a share above 0, up to 1")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One parsed answer to a problem."""

    teacher: Teacher
    sample: int
    is_hinted: bool
    parsed: Parsed


@dataclasses.dataclass(frozen=True)
class Choice:
    """What becomes of a problem's candidates.

    Attributes:
      label: the majority of the legal answers that nobody hinted at, or None.
      kept: the rationales, each with its weight.
      reasons: for each candidate why it is not among them, or None.
    """

    label: str | None
    kept: tuple[Rationale, ...]
    reasons: tuple[str | None, ...]


def choose(example: Example, candidates: Sequence[Candidate], config: FilterConfig) -> Choice:
    """Votes for the label, and keeps the rationales that pass all filters.

    The rationales of one teacher share its weight, so that an example does not weigh more for
    having several.
    """
    label = majority_answer(example, candidates)
    reasons: list[str | None] = []
    kept: list[Candidate] = []
    question = _shingles(example.input)
    for candidate in candidates:
        reason = candidate.parsed.reason or _rejection(example, label, candidate, config)
        if reason is None:
            reason = _text_rejection(candidate.parsed.rationale, question, config)
        if reason is None:
            reason = _surplus(candidate, kept, config)
        if reason is None:
            kept.append(candidate)
        reasons.append(reason)
    return Choice(label, tuple(_to_rationale(each, kept) for each in kept), tuple(reasons))


def majority_answer(example: Example, candidates: Sequence[Candidate]) -> str | None:
    """The legal answer with most votes; a teacher's samples share its weight, ties go to the first.

    Hinted answers have no vote: they were told.
    """
    votes: list[list] = []  # [answer, weight]
    for candidate in candidates:
        answer = candidate.parsed.answer
        if answer is None or candidate.is_hinted:
            continue
        form = candidate.teacher.answer_form(example)
        weight = candidate.teacher.weight / candidate.teacher.samples
        for vote in votes:
            if same_answer(vote[0], answer, form):
                vote[1] += weight
                break
        else:
            votes.append([answer, weight])
    return max(votes, key=lambda vote: round(vote[1], 9))[0] if votes else None


def is_gold(example: Example, answer: str) -> bool:
    """Whether an answer is the gold label."""
    return example.label is not None and is_correct(answer, example.label, example.answer_form)


def _rejection(
    example: Example, label: str | None, candidate: Candidate, config: FilterConfig
) -> str | None:
    """Why a legal answer's explanation is not wanted, by its answer."""
    answer = candidate.parsed.answer
    if candidate.is_hinted or config.keep == "gold":
        if example.label is None:
            return NO_GOLD
        if not is_gold(example, answer):
            return NOT_GOLD
    elif config.keep == "majority" and not same_answer(
        answer, label, candidate.teacher.answer_form(example)
    ):
        return NOT_MAJORITY
    if candidate.is_hinted and "hint" in normalize_text(candidate.parsed.rationale).split():
        return TELLS_HINT
    return None


def _text_rejection(rationale: str, question: set, config: FilterConfig) -> str | None:
    """Why an explanation is not wanted, by its text."""
    words = len(rationale.split())
    if config.min_words is not None and words < config.min_words:
        return TOO_SHORT
    if config.max_words is not None and words > config.max_words:
        return TOO_LONG
    if config.max_question_overlap is not None:
        shingles = _shingles(rationale)
        if len(shingles & question) >= config.max_question_overlap * len(shingles):
            return REPEATS_QUESTION
    return None


def _surplus(candidate: Candidate, kept: Sequence[Candidate], config: FilterConfig) -> str | None:
    """Why an explanation adds nothing to those kept before it."""
    shingles = _shingles(candidate.parsed.rationale) if kept else set()
    for other in kept:
        theirs = _shingles(other.parsed.rationale)
        if len(shingles & theirs) >= config.max_similarity * len(shingles | theirs):
            return NEAR_DUPLICATE
    of_teacher = sum(other.teacher.name == candidate.teacher.name for other in kept)
    return ENOUGH if of_teacher >= config.max_rationales else None


def _to_rationale(candidate: Candidate, kept: Sequence[Candidate]) -> Rationale:
    teacher = candidate.teacher
    sharers = sum(other.teacher.name == teacher.name for other in kept)
    return Rationale(
        text=candidate.parsed.rationale,
        weight=teacher.weight / sharers,
        teacher=teacher.name,
        prompt=teacher.prompt_digest,
        is_hinted=candidate.is_hinted,
    )


def _shingles(text: str) -> set[tuple[str, ...]]:
    """The runs of three words of a text (all of them where it has fewer), normalised."""
    words = normalize_text("".join(c if c.isalnum() else " " for c in text)).split()
    if len(words) <= SHINGLE_WORDS:
        return {tuple(words)}
    return set(zip(*(words[start:] for start in range(SHINGLE_WORDS)), strict=False))
