"""JSONL rows that pass between the stages: examples with rationales, and predictions.

May import the standard library and numpy. A file is UTF-8, one JSON object a line. Readers check
every row and report the first twenty problems of a file together, each with its path and line.

    for example in read_examples("records.jsonl"):
        print(example.input, example.label, example.rationale)
"""

import dataclasses
import functools
import json
import os
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from dslt import strict_json
from dslt.errors import InputError
from dslt.files import replacing

SPLITS = ("train", "validation", "test")
ANSWER_FORMS = ("text", "equation")
MAX_PROBLEMS = 20
MAX_WEIGHT = 1e6  # sums of weighted losses stay finite in float32


@dataclasses.dataclass(frozen=True)
class Rationale:
    """One explanation of an example.

    Attributes:
      text: the explanation without its answer.
      weight: of its tokens in the rationale loss, above 0.
      teacher, prompt: as in Example.
      is_hinted: whether the teacher was given the answer.
    """

    text: str
    weight: float = 1.0
    teacher: str | None = None
    prompt: str | None = None
    is_hinted: bool = False

    def __post_init__(self):
        if not self.text.strip():
            raise ValueError("field 'text' is empty; expected an explanation")
        _require_weight(self, "weight")


@dataclasses.dataclass(frozen=True)
class Example:
    """One problem with what is known about its answer: a row of `records.jsonl`.

    Attributes:
      id: unique within the dataset.
      dataset: what its SeqIO Tasks are named after (`<dataset>_label`, `<dataset>_rationale`).
      split: one of SPLITS.
      input: the problem as the student reads it, without a task prefix.
      label: the gold answer, or None where nobody knows it.
      teacher_label: the teacher's answer in the form of `label`, or None where it gave none that is
        legal.
      rationale: the teacher's explanation without its answer, or None.
      teacher: who explained (`scripted`, `released`, a model's name), or None.
      prompt: which prompt the teacher was given (a name or a hash), or None.
      answer_form: how answers compare: `text` by normalised match, `equation` by value.
      rationale_weight, is_hinted: of `rationale`, as in Rationale.
      more_rationales: further explanations of this example.
    """

    id: str
    dataset: str
    split: str
    input: str
    label: str | None = None
    teacher_label: str | None = None
    rationale: str | None = None
    teacher: str | None = None
    prompt: str | None = None
    answer_form: str = "text"
    rationale_weight: float = 1.0
    is_hinted: bool = False
    more_rationales: tuple[Rationale, ...] = ()

    def __post_init__(self):
        _require_member(self, "split", SPLITS)
        _require_member(self, "answer_form", ANSWER_FORMS)
        if not self.input.strip():
            raise ValueError("field 'input' is empty; expected the problem's text")
        if not self.dataset.isidentifier():
            raise ValueError(
                f"field 'dataset' is {self.dataset!r}; expected letters, digits and underscores, "
                "because SeqIO tasks are named after it"
            )
        for name in ("label", "teacher_label", "rationale"):
            text = getattr(self, name)
            if text is not None and not text.strip():
                raise ValueError(f"field '{name}' is blank; expected text, or null for none")
        _require_weight(self, "rationale_weight")
        if self.more_rationales and self.rationale is None:
            raise ValueError("field 'more_rationales' is set without 'rationale', the first one")

    def rationales(self) -> tuple[Rationale, ...]:
        """All explanations, `rationale` first; () where there is none."""
        if self.rationale is None:
            return ()
        first = Rationale(
            self.rationale, self.rationale_weight, self.teacher, self.prompt, self.is_hinted
        )
        return (first, *self.more_rationales)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a student answered to one example: a row of `predictions.jsonl`.

    Attributes:
      id, dataset, split, input, label, teacher_label, answer_form: as in Example.
      prediction: the decoded label.
      rationale: the student's own explanation, or None where none was asked for.
      teacher_rationale: the example's `rationale`, to read beside it.
      is_correct: whether `prediction` matches `label`; None where there is no gold label.
      probability: of `prediction` among the answers it was chosen from; None where it was decoded
        freely.
    """

    id: str
    dataset: str
    split: str
    input: str
    prediction: str
    label: str | None = None
    teacher_label: str | None = None
    rationale: str | None = None
    is_correct: bool | None = None
    answer_form: str = "text"
    probability: float | None = None
    teacher_rationale: str | None = None

    def __post_init__(self):
        _require_member(self, "split", SPLITS)
        _require_member(self, "answer_form", ANSWER_FORMS)


@dataclasses.dataclass(frozen=True)
class EvalInput:
    """An example as the student reads it.

    Attributes:
      example: the record.
      label_input_tokens: [length] int32, EOS included; the label task's input.
      rationale_input_tokens: [length] int32, the rationale task's input.
      is_truncated: whether one of them was cut to the longest input allowed.
    """

    example: Example
    label_input_tokens: np.ndarray
    rationale_input_tokens: np.ndarray
    is_truncated: bool


def read_examples(path: str | os.PathLike) -> Iterator[Example]:
    """Yields the examples of one file in order, holding one row at a time and the ids seen.

    Raises:
      InputError: at the end of the file, naming the first twenty rows that cannot be used (nothing
        more is yielded after the first of them); at once if the file cannot be read or has no row.
    """
    return _read_rows(Path(path), Example)


def labelled_splits(examples: Iterable[Example]) -> set[str]:
    """The splits that have gold labels: those that a student can be judged on."""
    return {example.split for example in examples if example.label is not None}


def read_predictions(path: str | os.PathLike) -> Iterator[Prediction]:
    """Yields the predictions of one file; errors as in `read_examples`."""
    return _read_rows(Path(path), Prediction)


def write_rows(path: str | os.PathLike, rows: Iterable[Example | Prediction]) -> int:
    """Writes rows as JSONL and returns their number; the file appears whole or not at all."""
    count = 0
    with replacing(path) as file:
        for row in rows:
            file.write(json.dumps(_to_json(row), ensure_ascii=False) + "\n")
            count += 1
    return count


def _to_json(row: Example | Prediction) -> dict:
    """A row's fields; those that came with several rationales stand only where they are needed."""
    fields = dataclasses.asdict(row)
    for name, default in _UNWRITTEN.items():
        if name in fields and fields[name] == default:
            del fields[name]
    return fields


def read_json_lines(path: Path, problems: list[str]) -> Iterator[tuple[int, dict]]:
    """Yields (line number, object) for each line; appends what is no JSON object to `problems`.

    Blank lines are skipped. Stops early once `problems` holds MAX_PROBLEMS.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); expected a JSONL file"
        ) from None
    with file:
        for number, raw in enumerate(file, start=1):
            if len(problems) >= MAX_PROBLEMS:
                return
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                row = strict_json.loads(text)
            except UnicodeDecodeError as error:
                problems.append(
                    f"{path}:{number}: byte {error.start} is not UTF-8; save the file as UTF-8"
                )
            except ValueError as error:
                problems.append(f"{path}:{number}: not JSON ({error}); expected one object a line")
            else:
                if isinstance(row, dict):
                    yield number, row
                else:
                    problems.append(
                        f"{path}:{number}: found a JSON {_json_type(row)}; expected an object"
                    )


def raise_problems(path: Path, problems: list[str]) -> None:
    """Raises one InputError that lists `problems`, if there are any."""
    if problems:
        more = " (stopped at the twentieth)" if len(problems) >= MAX_PROBLEMS else ""
        raise InputError(
            f"{path}: {len(problems)} unusable rows{more}:\n  " + "\n  ".join(problems)
        )


def _read_rows(path: Path, row_type: type) -> Iterator:
    problems: list[str] = []
    line_of_id: dict[tuple[str, str], int] = {}
    for number, row in read_json_lines(path, problems):
        try:
            parsed = _parse_row(row, row_type)
            key = (parsed.dataset, parsed.id)
            if key in line_of_id:
                raise ValueError(
                    f"id {parsed.id!r} is that of line {line_of_id[key]}; ids must be unique"
                )
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
            continue
        line_of_id[key] = number
        if not problems:
            yield parsed
    raise_problems(path, problems)
    if not line_of_id:
        raise InputError(f"{path}: has no rows; expected one JSON object a line")


def _parse_row(row: dict, row_type: type) -> Example | Prediction | Rationale:
    """Builds a row after checking names and types; raises ValueError with all the row's faults."""
    fields = {field.name: field for field in dataclasses.fields(row_type)}
    faults = [
        f"unknown field {name!r}; expected {', '.join(fields)}"
        for name in row
        if name not in fields
    ]
    if type(row.get("more_rationales")) is list and "more_rationales" in fields:
        row = {**row, "more_rationales": _parse_rationales(row["more_rationales"], faults)}
    for name, field in fields.items():
        allowed = _allowed_types(row_type, name)
        if name not in row:
            if field.default is dataclasses.MISSING:
                faults.append(f"field {name!r} is missing")
        elif type(row[name]) not in allowed:
            expected = " or ".join(dict.fromkeys(_JSON_NAMES[kind] for kind in allowed))
            faults.append(f"field {name!r} is a {_json_type(row[name])}; expected {expected}")
    if faults:
        raise ValueError("; ".join(faults))
    return row_type(**row)


def _parse_rationales(rows: list, faults: list[str]) -> tuple[Rationale, ...]:
    """Builds the further rationales of an example; appends what is wrong to `faults`."""
    rationales = []
    for number, row in enumerate(rows):
        try:
            if not isinstance(row, dict):
                raise ValueError(f"is a {_json_type(row)}; expected object")
            rationales.append(_parse_row(row, Rationale))
        except ValueError as error:
            faults.append(f"field 'more_rationales', item {number}: {error}")
    return tuple(rationales)


@functools.cache  # resolving the hints costs 25 times what the rest of a row does
def _allowed_types(row_type: type, name: str) -> tuple[type, ...]:
    hint = typing.get_type_hints(row_type)[name]
    if typing.get_origin(hint) is tuple:
        return (tuple,)  # a JSON list, parsed by then
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return (*kinds, int) if float in kinds else kinds  # JSON may write 1.0 as 1


def _require_weight(row, name: str) -> None:
    if not 0 < getattr(row, name) <= MAX_WEIGHT:
        raise ValueError(
            f"field {name!r} is {getattr(row, name)}; expected a number above 0, at most "
            f"{MAX_WEIGHT:,.0f}"
        )


def _require_member(row, name: str, allowed: tuple[str, ...]) -> None:
    if getattr(row, name) not in allowed:
        raise ValueError(
            f"field {name!r} is {getattr(row, name)!r}; expected one of {', '.join(allowed)}"
        )


_UNWRITTEN = {"rationale_weight": 1.0, "is_hinted": False, "more_rationales": ()}
_JSON_NAMES = {
    str: "string", bool: "boolean", int: "number", float: "number",
    type(None): "null", dict: "object", list: "list", tuple: "list",
}  # fmt: skip


def _json_type(value) -> str:
    return _JSON_NAMES[type(value)]
