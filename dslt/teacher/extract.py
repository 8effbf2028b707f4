"""Problems and their completions → records.jsonl, with every rejected completion listed.

May import dslt.records and dslt.metrics. Three files are written to the output directory:
`records.jsonl` (an example a line, all of them), `rejected.jsonl` (id, reason, completion) and
`summary.json`.

    summary = extract(examples, completions, teacher="released", prompt="paper", output_dir="out")
    print(format_summary(summary))
"""

import collections
import dataclasses
import filecmp
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from dslt.errors import InputError
from dslt.metrics import Accuracy, accuracy, is_correct
from dslt.records import Example, write_rows
from dslt.teacher.parse import AnswerForm, answer_form, choices_of, parse_completion

NO_COMPLETION = "no completion"

RECORDS = "records.jsonl"
REJECTED = "rejected.jsonl"
SUMMARY = "summary.json"


@dataclasses.dataclass(frozen=True)
class SplitSummary:
    """What became of one split of one dataset.

    Attributes:
      dataset, split: which.
      examples: rows.
      kept: rows with a rationale and a legal teacher label.
      rejected: rows without, by reason.
      accuracy: the teacher's, over every row with a gold label; a rejected row is a wrong one.
    """

    dataset: str
    split: str
    examples: int
    kept: int
    rejected: dict[str, int]
    accuracy: Accuracy


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `extract` did.

    Attributes:
      teacher, prompt: as in the records.
      records_path, rejected_path: the files written.
      splits: a SplitSummary each, in the order of their first rows.
    """

    teacher: str
    prompt: str | None
    records_path: str
    rejected_path: str
    splits: tuple[SplitSummary, ...]


def extract(
    examples: Iterable[Example],
    completions: Mapping[str, str],
    *,
    teacher: str,
    prompt: str | None,
    output_dir: str | os.PathLike,
    form: AnswerForm | None = None,
) -> Summary:
    """Parses each example's completion and writes the records.

    A completion that cannot be parsed leaves its record without teacher label and rationale. The
    records are never replaced by others: a directory that already holds different ones is refused,
    the same ones are kept.

    Args:
      examples: problems, gold labels set where they are known.
      completions: the teacher's raw text by example id.
      teacher, prompt: provenance, kept in each record that has a completion.
      output_dir: where to write; made if it is missing.
      form: what a legal answer is; declared by the dataset if None.

    Raises:
      InputError: if `output_dir` holds other records.
    """
    output_dir = Path(output_dir)
    rejected: list[str] = []
    tallies: dict[tuple[str, str], _Tally] = {}

    def records() -> Iterator[Example]:
        for example in examples:
            completion = completions.get(example.id)
            record, reason = _to_record(example, completion, teacher, prompt, form)
            key = (example.dataset, example.split)
            tallies.setdefault(key, _Tally()).add(record, reason)
            if reason:
                row = {"id": example.id, "reason": reason, "completion": completion}
                rejected.append(json.dumps(row, ensure_ascii=False) + "\n")
            yield record

    write_records(output_dir / RECORDS, records())
    _write_text(output_dir / REJECTED, "".join(rejected))
    summary = Summary(
        teacher=teacher,
        prompt=prompt,
        records_path=str(output_dir / RECORDS),
        rejected_path=str(output_dir / REJECTED),
        splits=tuple(tally.summary(*key) for key, tally in tallies.items()),
    )
    _write_text(output_dir / SUMMARY, json.dumps(dataclasses.asdict(summary), indent=2) + "\n")
    return summary


def write_records(path: Path, records: Iterable[Example]) -> None:
    """Writes records; the same ones are kept, and different ones never replaced (InputError)."""
    new = path.with_name(path.name + ".new")
    write_rows(new, records)
    if path.exists() and not filecmp.cmp(path, new, shallow=False):
        new.unlink()
        raise InputError(
            f"{path}: holds other records than this extraction gives, and is never overwritten; "
            "choose another output directory, or move the file away"
        )
    new.replace(path)


def format_summary(summary: Summary) -> str:
    """A table of a line a split, then the reasons of what was rejected."""
    columns = f"{'dataset':<10} {'split':<10} {'examples':>8} {'kept':>8} {'rejected':>8}"
    lines = [f"{columns}  teacher is right"]
    counts: collections.Counter = collections.Counter()
    for split in summary.splits:
        share = split.accuracy.value
        right = (
            "no gold label"
            if share is None
            else (f"{100 * share:.1f} % ± {100 * split.accuracy.standard_error:.1f}")
        )
        lines.append(
            f"{split.dataset:<10} {split.split:<10} {split.examples:>8,} {split.kept:>8,} "
            f"{split.examples - split.kept:>8,}  {right}"
        )
        counts.update(split.rejected)
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common())
    lines.append(f"rejected: {reasons or 'none'}")
    if counts:
        lines.append(f"listed in {summary.rejected_path}")
    return "\n".join(lines)


def _to_record(
    example: Example,
    completion: str | None,
    teacher: str,
    prompt: str | None,
    form: AnswerForm | None,
) -> tuple[Example, str | None]:
    """The example with what its completion teaches, and the reason if that is nothing."""
    if completion is None:
        unexplained = dataclasses.replace(
            example, teacher_label=None, rationale=None, teacher=None, prompt=None
        )
        return unexplained, NO_COMPLETION
    parsed = parse_completion(completion, form or answer_form(example), choices_of(example))
    record = dataclasses.replace(
        example,
        teacher_label=parsed.answer,
        rationale=parsed.rationale,
        teacher=teacher,
        prompt=prompt,
    )
    return record, parsed.reason


class _Tally:
    """Counts one split's records as they are written."""

    def __init__(self):
        self._reasons: collections.Counter = collections.Counter()
        self._is_right: list[bool | None] = []

    def add(self, record: Example, reason: str | None) -> None:
        self._reasons[reason] += 1
        self._is_right.append(_is_right(record))

    def summary(self, dataset: str, split: str) -> SplitSummary:
        rejected = {reason: n for reason, n in self._reasons.most_common() if reason}
        return SplitSummary(
            dataset=dataset,
            split=split,
            examples=self._reasons.total(),
            kept=self._reasons[None],
            rejected=rejected,
            accuracy=accuracy(self._is_right),
        )


def _is_right(record: Example) -> bool | None:
    if record.label is None:
        return None
    if record.teacher_label is None:
        return False
    return is_correct(record.teacher_label, record.label, record.answer_form)


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
