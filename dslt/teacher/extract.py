"""Problems → questions → the store of completions → records.jsonl, and what was rejected.

May import dslt.records and dslt.metrics. In the output directory lie `completions.jsonl` (the
store, all that was paid for), `records.jsonl` (an example a line, all of them), `rejected.jsonl` (a
line a completion that is not used, with its reason) and `summary.json`. The last three are made
anew from the store by each run; records that come out otherwise than before are set aside.

    with CompletionStore("out") as store:
        questions, stats = ask_teachers(examples, rows, teachers, store, AskConfig())
        summary = write_extraction(examples, rows, questions, store, FilterConfig())
    print(format_summary(summary))
"""

import collections
import dataclasses
import filecmp
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from dslt.errors import InputError
from dslt.files import write_text
from dslt.metrics import Accuracy, accuracy, is_correct
from dslt.records import Example, write_rows
from dslt.teacher.endpoint import AskConfig, AskStats, Prices, ask
from dslt.teacher.filters import FILTER_REASONS, Candidate, FilterConfig, choose, is_gold
from dslt.teacher.parse import ILLEGAL, UNPARSED, choices_of, parse_completion
from dslt.teacher.prompts import store_prompt
from dslt.teacher.questions import (
    EndpointTeacher,
    Question,
    Teacher,
    answer_locally,
    plan_questions,
    to_requests,
)
from dslt.teacher.store import Answer, CompletionStore

NO_COMPLETION = "no completion"

RECORDS = "records.jsonl"
REJECTED = "rejected.jsonl"
SUMMARY = "summary.json"

UNTAUGHT = {  # the fields that a teacher fills
    field.name: field.default
    for field in dataclasses.fields(Example)
    if field.name not in ("answer_form", "label") and field.default is not dataclasses.MISSING
}


@dataclasses.dataclass(frozen=True)
class SplitSummary:
    """What became of one split of one dataset.

    Attributes:
      dataset, split: which.
      examples: rows.
      not_asked: rows that no teacher was asked about.
      kept: rows with a rationale.
      rationales: of all these rows.
      rejected: completions without, by reason; a row without any completion counts as one.
      accuracy: the teacher label's, over every asked row with a gold label; a row without a teacher
        label is a wrong one.
    """

    dataset: str
    split: str
    examples: int
    not_asked: int
    kept: int
    rationales: int
    rejected: dict[str, int]
    accuracy: Accuracy


@dataclasses.dataclass(frozen=True)
class Funnel:
    """How many of one teacher's completions came how far."""

    asked: int = 0
    answered: int = 0
    parsed: int = 0
    legal: int = 0
    kept: int = 0


@dataclasses.dataclass(frozen=True)
class Summary:
    """What an extraction has given so far.

    Attributes:
      records_path, rejected_path: the files written.
      set_aside: where records went that were there and are others, or None.
      splits: a SplitSummary each, in the order of their first rows.
      funnels: by teacher.
      repeats: requests that were under way when a run was killed, and were sent again.
      input_tokens, output_tokens: of all stored answers to these questions.
    """

    records_path: str
    rejected_path: str
    set_aside: str | None
    splits: tuple[SplitSummary, ...]
    funnels: dict[str, Funnel]
    repeats: int
    input_tokens: int
    output_tokens: int


def ask_teachers(
    examples: Sequence[Example],
    rows: Sequence[int],
    teachers: Sequence[Teacher],
    store: CompletionStore,
    config: AskConfig | None,
    retry_with_hint: bool = False,
) -> tuple[list[Question], AskStats]:
    """Asks what the store does not hold, and returns all questions, hinted ones included.

    Args:
      rows: which examples are asked about.
      config: of the endpoints; None asks none of them, and the store must do.
      retry_with_hint: ask again, once and with the gold label as a hint, about the train examples
        whose answers are all wrong.
    """
    questions = plan_all(examples, rows, teachers)
    stats = _ask_pending(questions, store, config)
    if retry_with_hint and not stats.is_interrupted:
        hinted = plan_hinted(examples, questions, store.answers)
        _add(stats, _ask_pending(hinted, store, config))
        questions += hinted
    return questions, stats


def plan_all(
    examples: Sequence[Example], rows: Sequence[int], teachers: Sequence[Teacher]
) -> list[Question]:
    """The questions to all teachers, none of them hinted.

    Raises:
      InputError: two teachers of one name, or equations that would be compared as text.
    """
    names = [teacher.name for teacher in teachers]
    if len(set(names)) < len(names):
        raise InputError(f"two teachers are called alike among {', '.join(names)}; name them")
    for teacher in teachers:
        _check_comparable([examples[row] for row in rows], teacher)
    return [q for teacher in teachers for q in plan_questions(examples, rows, teacher)]


def _check_comparable(examples: Iterable[Example], teacher: Teacher) -> None:
    """Raises InputError where equations would be compared as text: `(84 / 2)` would not be 42."""
    for example in examples:
        is_equation = teacher.answer_form(example).kind == "equation"
        if is_equation and example.answer_form != "equation":
            raise InputError(
                f"example {example.id}: teacher {teacher.name!r} is to answer by an equation, but "
                f"the answer form is {example.answer_form!r}, which would judge (84 / 2) wrong "
                "where 42 is right; expected --answer_form equation for a table of equations, "
                "else another --prompt"
            )


def plan_hinted(
    examples: Sequence[Example],
    questions: Sequence[Question],
    answers: Mapping[str, Answer],
    *,
    is_bound: bool = False,
) -> list[Question]:
    """The hinted questions about train examples whose teacher answered, never with the gold label.

    Held-out examples are not trained on, so nothing is spent on their rationales.

    Args:
      answers: by key.
      is_bound: take what has no answer yet for wrong; so many questions may follow at most.
    """
    wrong: dict[str, dict[int, bool]] = {}
    teachers = {question.teacher.name: question.teacher for question in questions}
    for question in questions:
        example, is_answered = examples[question.row], question.key in answers
        if example.split != "train" or example.label is None or not (is_answered or is_bound):
            continue
        answer = parse_question(question, example, answers).answer if is_answered else None
        is_wrong = answer is None or not is_gold(example, answer)
        of_teacher = wrong.setdefault(question.teacher.name, {})
        of_teacher[question.row] = of_teacher.get(question.row, True) and is_wrong
    return [
        question
        for name, of_teacher in wrong.items()
        for question in plan_questions(
            examples,
            [row for row, is_wrong in of_teacher.items() if is_wrong],
            teachers[name],
            True,
        )
    ]


def pending(questions: Iterable[Question], answers: Mapping[str, Answer]) -> list[Question]:
    """The questions that have no answer yet."""
    return [question for question in questions if question.key not in answers]


def parse_question(question: Question, example: Example, answers: Mapping[str, Answer]):
    """The Parsed of a question's answer."""
    answer = answers[question.key]
    return parse_completion(
        answer.text,
        question.teacher.answer_form(example),
        choices_of(example),
        reasoning=answer.reasoning,
        finish_reason=answer.finish_reason,
    )


def write_extraction(
    examples: Sequence[Example],
    rows: Sequence[int],
    questions: Sequence[Question],
    store: CompletionStore,
    filters: FilterConfig,
) -> Summary:
    """Parses and filters the stored answers and writes the records; sends nothing.

    A completion that is not used leaves its record without teacher label and rationale.

    Args:
      rows: those that were asked about.
    """
    asked = set(rows)
    by_row: dict[int, list[Question]] = {}
    for question in questions:
        by_row.setdefault(question.row, []).append(question)
    for teacher in {q.teacher.name: q.teacher for q in questions}.values():
        if isinstance(teacher, EndpointTeacher):
            store_prompt(teacher.prompt, store.directory)
    rejected: list[str] = []
    tallies: dict[tuple[str, str], _Tally] = {}
    funnels: dict[str, collections.Counter] = {}

    def records() -> Iterator[Example]:
        for row, example in enumerate(examples):
            mine = by_row.get(row, [])
            record, reasons = _to_record(example, mine, store, filters)
            tally = tallies.setdefault((example.dataset, example.split), _Tally())
            tally.add(record, reasons if row in asked else None)
            for question, reason in zip(mine, reasons, strict=False):
                _count(funnels.setdefault(question.teacher.name, collections.Counter()), reason)
            if row in asked:
                rejected.extend(_rejections(example, mine, reasons, store))
            yield record

    directory = store.directory
    set_aside = write_records(directory / RECORDS, records())
    write_text(directory / REJECTED, "".join(rejected))
    answers = [store.answers[key] for key in {q.key for q in questions} if key in store.answers]
    summary = Summary(
        records_path=str(directory / RECORDS),
        rejected_path=str(directory / REJECTED),
        set_aside=set_aside and str(set_aside),
        splits=tuple(tally.summary(*key) for key, tally in tallies.items()),
        funnels={name: Funnel(**counts) for name, counts in funnels.items()},
        repeats=store.repeats,
        input_tokens=sum(answer.input_tokens for answer in answers),
        output_tokens=sum(answer.output_tokens for answer in answers),
    )
    write_text(directory / SUMMARY, json.dumps(dataclasses.asdict(summary), indent=2) + "\n")
    return summary


def write_records(path: Path, records: Iterable[Example]) -> Path | None:
    """Writes records. Others that are there are set aside under their digest; returns where."""
    new = path.with_name(path.name + ".new")
    write_rows(new, records)
    aside = None
    if path.exists() and not filecmp.cmp(path, new, shallow=False):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:8]
        aside = path.with_name(f"{path.stem}-{digest}{path.suffix}")
        path.replace(aside)
    new.replace(path)
    return aside


def format_summary(summary: Summary, prices: Prices | None = None) -> str:
    """A table of a line a split, the funnel of each teacher, and the reasons of rejections."""
    columns = f"{'dataset':<10} {'split':<10} {'examples':>8} {'kept':>8} {'rejected':>8}"
    lines = [f"{columns}  teacher is right"]
    counts: collections.Counter = collections.Counter()
    for split in summary.splits:
        lines.append(
            f"{split.dataset:<10} {split.split:<10} {split.examples:>8,} {split.kept:>8,} "
            f"{split.examples - split.kept - split.not_asked:>8,}  {_format_accuracy(split)}"
        )
        counts.update(split.rejected)
    for name, funnel in summary.funnels.items():
        steps = " → ".join(f"{step} {n:,}" for step, n in dataclasses.asdict(funnel).items())
        lines.append(f"{name}: {steps}")
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common())
    lines.append(f"rejected: {reasons or 'none'}")
    if counts:
        lines.append(f"listed in {summary.rejected_path}")
    if summary.input_tokens or summary.output_tokens:
        tokens = (summary.input_tokens, summary.output_tokens)
        cost = f", cost {prices.cost(*tokens):,.2f}" if prices and prices != Prices() else ""
        lines.append(f"tokens paid for: {tokens[0]:,} in, {tokens[1]:,} out{cost}")
    if summary.repeats:
        lines.append(
            f"sent again, because a run was killed while they were under way: {summary.repeats:,}"
        )
    if summary.set_aside:
        lines.append(f"the records that were here before are now {summary.set_aside}")
    return "\n".join(lines)


def format_stats(stats: AskStats) -> str:
    """What was sent in this run, in one line."""
    retries = ", ".join(f"{cause} {count:,}" for cause, count in stats.retries.most_common())
    rate = stats.answered / stats.secs if stats.secs else 0.0
    return (
        f"sent {stats.attempts:,} requests in {stats.secs:,.1f} s ({rate:,.1f} answers/s): "
        f"{stats.answered:,} answers, {stats.failed:,} failed; tried again: {retries or 'none'}"
    )


def _format_accuracy(split: SplitSummary) -> str:
    if split.not_asked == split.examples:
        return "not asked"
    share, error = split.accuracy.value, split.accuracy.standard_error
    right = "no gold label" if share is None else f"{100 * share:.1f} % ± {100 * error:.1f}"
    return f"{right}, {split.not_asked:,} not asked" if split.not_asked else right


def _ask_pending(
    questions: Sequence[Question], store: CompletionStore, config: AskConfig | None
) -> AskStats:
    """Sends each teacher what it has not answered."""
    total = AskStats()
    by_teacher: dict[str, list[Question]] = {}
    for question in pending(questions, store.answers):
        by_teacher.setdefault(question.teacher.name, []).append(question)
    for unanswered in by_teacher.values():
        teacher = unanswered[0].teacher
        if not isinstance(teacher, EndpointTeacher):
            answer_locally(unanswered, store)
        elif config is not None and not total.is_interrupted:
            samples = len({question.key for question in unanswered})
            _add(total, ask(to_requests(unanswered), teacher, config, store, total=samples))
    return total


def _add(total: AskStats, stats: AskStats) -> None:
    for field in dataclasses.fields(AskStats):
        name = field.name
        if name == "is_interrupted":
            total.is_interrupted |= stats.is_interrupted
        else:
            setattr(total, name, getattr(total, name) + getattr(stats, name))


def _to_record(
    example: Example,
    questions: Sequence[Question],
    store: CompletionStore,
    filters: FilterConfig,
) -> tuple[Example, list[str | None]]:
    """The example with what its answers teach, and for each question why it teaches nothing."""
    answered = [question for question in questions if question.key in store.answers]
    candidates = [
        Candidate(q.teacher, q.sample, q.is_hinted, parse_question(q, example, store.answers))
        for q in answered
    ]
    choice = choose(example, candidates, filters)
    reason_of = {id(q): reason for q, reason in zip(answered, choice.reasons, strict=True)}
    reasons = [reason_of.get(id(question), NO_COMPLETION) for question in questions]
    bare = dataclasses.replace(example, **UNTAUGHT)
    if not answered:
        return bare, reasons or [NO_COMPLETION]
    teacher = answered[0].teacher
    bare = dataclasses.replace(
        bare, teacher_label=choice.label, teacher=teacher.name, prompt=teacher.prompt_digest
    )
    if not choice.kept:
        return bare, reasons
    first, *more = choice.kept
    record = dataclasses.replace(
        bare,
        rationale=first.text,
        teacher=first.teacher,
        prompt=first.prompt,
        rationale_weight=first.weight,
        is_hinted=first.is_hinted,
        more_rationales=tuple(more),
    )
    return record, reasons


def _rejections(
    example: Example,
    questions: Sequence[Question],
    reasons: Sequence[str | None],
    store: CompletionStore,
) -> Iterator[str]:
    """A line for each completion that is not used."""
    if not questions:
        row = {"id": example.id, "reason": NO_COMPLETION, "completion": None}
        yield json.dumps(row, ensure_ascii=False) + "\n"
    for question, reason in zip(questions, reasons, strict=False):
        if reason is None:
            continue
        answer = store.answers.get(question.key)
        row = {"id": example.id, "teacher": question.teacher.name, "sample": question.sample}
        row |= {"is_hinted": True} if question.is_hinted else {}
        row |= {"reason": reason, "completion": answer and answer.text}
        if answer is None and question.key in store.failures:
            row["failure"] = store.failures[question.key]
        yield json.dumps(row, ensure_ascii=False) + "\n"


def _count(funnel: collections.Counter, reason: str | None) -> None:
    """Adds one completion to the stages that it reached."""
    funnel["asked"] += 1
    if reason == NO_COMPLETION:
        return
    funnel["answered"] += 1
    funnel["parsed"] += reason not in UNPARSED
    funnel["legal"] += reason not in (*UNPARSED, *ILLEGAL)
    funnel["kept"] += reason not in (*UNPARSED, *ILLEGAL, *FILTER_REASONS)


class _Tally:
    """Counts one split's records as they are written."""

    def __init__(self):
        self._examples = self._not_asked = self._kept = self._rationales = 0
        self._reasons: collections.Counter = collections.Counter()
        self._is_right: list[bool | None] = []

    def add(self, record: Example, reasons: Sequence[str | None] | None) -> None:
        """Adds one record with the reasons of its completions; None: it was not asked about."""
        self._examples += 1
        if reasons is None:
            self._not_asked += 1
            return
        self._reasons.update(reason for reason in reasons if reason)
        self._kept += record.rationale is not None
        self._rationales += len(record.rationales())
        self._is_right.append(_is_right(record))

    def summary(self, dataset: str, split: str) -> SplitSummary:
        return SplitSummary(
            dataset=dataset,
            split=split,
            examples=self._examples,
            not_asked=self._not_asked,
            kept=self._kept,
            rationales=self._rationales,
            rejected=dict(self._reasons.most_common()),
            accuracy=accuracy(self._is_right),
        )


def _is_right(record: Example) -> bool | None:
    if record.label is None:
        return None
    if record.teacher_label is None:
        return False
    return is_correct(record.teacher_label, record.label, record.answer_form)
