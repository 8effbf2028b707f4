"""Problems from where they lie → Examples without rationale: released files, tables, TFDS.

May import dslt.records and dslt.metrics; TensorFlow Datasets only inside `read_tfds`, so that
importing this module starts neither TensorFlow nor SeqIO.

    examples = hold_out_validation(read_released("data/svamp", "svamp"))  # 720 / 80 / 200

An id is `<dataset>-<source split>-<row>`: it stays with the row when validation is held out, and a
file of completions in the row order of the source finds its example by it.
"""

import csv
import dataclasses
import difflib
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from dslt import strict_json
from dslt.errors import InputError
from dslt.metrics import evaluate_equation
from dslt.records import MAX_PROBLEMS, Example, raise_problems, read_json_lines

NLI_LABELS = ("entailment", "neutral", "contradiction")  # in the order of their class ids
RELEASED_DATASETS = ("svamp", "cqa", "esnli", "anli1")
SPLIT_OF_WORD = {
    "train": "train", "valid": "validation", "validation": "validation", "dev": "validation",
    "val": "validation", "test": "test",
}  # fmt: skip

# TFDS has CoS-E v1.11 as its only version, under the plain name; `cos_e/v1.11` is no config there.
TFDS_NAMES = {"esnli": "esnli", "anli1": "anli/r1", "cqa": "cos_e"}
DATASET_OF_TFDS_NAME = {"anli": "anli1", "cos_e": "cqa"}  # where the two differ

_MAX_CSV_FIELD_CHARACTERS = 10_000_000


def nli_input(premise: str, hypothesis: str) -> str:
    """`premise: ... hypothesis: ...`.

    Source: the authors' code joins the two by the end-of-sequence token. This names them instead,
    because that token ends the source in every vocabulary here; T5's own MNLI form does likewise.
    """
    return f"premise: {premise} hypothesis: {hypothesis}"


def choice_input(question: str, choices: Sequence[str]) -> str:
    """The question, `Answer Choices:`, then a line `(a) ...` a choice.

    Source: the authors' code, data_utils.py. Here the choices' outer white space is taken off.
    """
    lettered = (f"({chr(ord('a') + i)}) {choice.strip()}" for i, choice in enumerate(choices))
    return "\n".join([question, "Answer Choices:", *lettered])


def hold_out_validation(
    examples: list[Example], fraction: float = 0.1, seed: int = 0
) -> list[Example]:
    """Turns ⌈fraction · n⌉ of the n train examples into validation, chosen by the seed.

    Order and ids stay. SVAMP becomes 720 / 80 / 200, CQA 8,766 / 975 / 1,221: the paper's counts,
    though not its rows, which another generator chose. Examples that already hold a validation
    split, or no train split, come back as they are.

    Raises:
      InputError: the fraction is no share, leaves no train example or holds out none.
    """
    if any(example.split == "validation" for example in examples):
        return list(examples)
    train = [index for index, example in enumerate(examples) if example.split == "train"]
    if not train:
        return list(examples)
    if not 0 < fraction < 1:
        raise InputError(
            f"the validation fraction is {fraction}; expected a share above 0, below 1"
        )
    count = math.ceil(fraction * len(train) - 1e-9)  # 0.07 · 100 is 7.000000000000001
    if not 0 < count < len(train):
        raise InputError(
            f"a validation fraction of {fraction} takes {count} of {len(train)} train examples; "
            "expected at least one of each, so choose another fraction or bring a validation split"
        )
    chosen = set(np.random.default_rng(seed).permutation(train)[:count].tolist())
    return [
        dataclasses.replace(example, split="validation") if index in chosen else example
        for index, example in enumerate(examples)
    ]


def read_released(directory: str | os.PathLike, dataset: str) -> list[Example]:
    """Reads `<dataset>_{train,valid,test}.json` of the paper's released layout, gold labels set.

    SVAMP rows have input and label (an equation); CQA rows question, choices and answer; e-SNLI
    and ANLI rows premise, hypothesis and label, a name or a class id in the order of NLI_LABELS.
    A file is JSONL or one JSON list. The train and the test file must be there; validation only
    where the dataset has some (`hold_out_validation` makes it elsewhere).

    Raises:
      InputError: for an unknown dataset, a missing file, or rows that cannot be used (the first
        twenty of a file, with their lines).
    """
    if dataset not in RELEASED_DATASETS:
        raise InputError(
            f"dataset is {dataset!r}; expected one of {', '.join(RELEASED_DATASETS)}. "
            "Any other dataset comes in as a JSONL or CSV table"
        )
    directory = Path(directory)
    examples = []
    for word in ("train", "valid", "test"):
        path = directory / f"{dataset}_{word}.json"
        if path.exists() or word != "valid":
            examples += _read_released_split(path, dataset, word)
    return examples


def read_table(
    path: str | os.PathLike,
    dataset: str,
    *,
    input_columns: Sequence[str],
    label_column: str | None = None,
    rationale_column: str | None = None,
    id_column: str | None = None,
    split: str = "train",
    split_column: str | None = None,
    answer_form: str = "text",
) -> list[Example]:
    """Reads any JSONL (`.jsonl`, `.json`) or CSV (`.csv`) table whose columns are named.

    Args:
      path: the file, UTF-8.
      dataset: what the examples, and the tasks made of them, are called.
      input_columns: one column is the input as it stands; several are joined as
        `<column>: <text> <column>: <text>`, in the order given.
      label_column: the gold label as text; null, or an empty CSV cell, is an unknown one.
      rationale_column: explanations that the table already has.
      id_column: unique ids; the default is `<dataset>-<split>-<row>`, rows counted in the file.
      split: of all rows, where `split_column` is not given.
      split_column: each row's split: train, validation (valid, val, dev) or test.
      answer_form: `text` or `equation`, as in Example.

    Raises:
      InputError: naming path and line of the first twenty rows that cannot be used.
    """
    path = Path(path)
    columns = [*input_columns, label_column, rationale_column, id_column, split_column]
    columns = [column for column in columns if column is not None]
    if not input_columns:
        raise InputError(f"{path}: no input column is named; name at least one")
    try:  # what would be wrong in every row
        Example("", dataset, SPLIT_OF_WORD.get(split, split), "?", answer_form=answer_form)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    problems: list[str] = []
    if path.suffix == ".csv":
        rows = _read_csv(path, columns, problems)
    elif path.suffix in (".jsonl", ".json"):
        rows = _read_json(path, problems)
    else:
        raise InputError(f"{path}: is no .jsonl, .json or .csv file; rename it to what it holds")

    def to_example(row: dict, number: int) -> Example:
        _require_columns(row, columns)
        word = _split_word(row, split_column) if split_column else split
        row_id = _text(row, id_column) if id_column else f"{dataset}-{word}-{number}"
        label = _optional_text(row, label_column)
        if answer_form == "equation" and label and evaluate_equation(label) is None:
            raise ValueError(
                f"label {label!r} has no value; expected numbers with + - * / and parentheses, or "
                "answer form 'text'"
            )
        return Example(
            id=row_id,
            dataset=dataset,
            split=SPLIT_OF_WORD.get(word, word),
            input=_join_inputs(row, input_columns),
            label=label,
            rationale=_optional_text(row, rationale_column),
            answer_form=answer_form,
        )

    return _collect(path, rows, to_example, problems)


def read_tfds(
    dataset: str, data_dir: str | os.PathLike | None = None, download: bool = True
) -> list[Example]:
    """Reads `esnli`, `anli1` (TFDS `anli/r1`) or `cqa` (TFDS `cos_e`) through `tfds.load`.

    TFDS shuffled the rows when it prepared them, so the ids name the source split `tfds_<split>`:
    the released completions, which follow another order, then find no example by mistake. CoS-E's
    validation split is the test split, as in the paper.

    Args:
      dataset: a key of TFDS_NAMES.
      data_dir: where TFDS keeps prepared datasets; its own default if None.
      download: whether to download and prepare what is not there.

    Raises:
      InputError: for another dataset, or one that TFDS could not load.
    """
    if dataset not in TFDS_NAMES:
        raise InputError(f"dataset is {dataset!r}; expected one of {', '.join(TFDS_NAMES)}")
    import tensorflow_datasets as tfds  # slow, and nothing else here needs it

    name = TFDS_NAMES[dataset]
    try:
        splits, info = tfds.load(
            name, data_dir=data_dir, download=download, shuffle_files=False, with_info=True
        )
    except Exception as error:  # of any kind: network, disk, checksums, missing packages
        raise InputError(
            f"tfds.load({name!r}, data_dir={str(data_dir)!r}) failed: "
            f"{type(error).__name__}: {error}; expected a prepared dataset there, or a network to "
            "prepare it from"
        ) from error
    label_names = info.features["label"].names if "label" in info.features else []
    label_names = [_nli_label_of(label_name) for label_name in label_names]
    examples = []
    for source_split in splits:
        for number, raw in enumerate(tfds.as_numpy(splits[source_split])):
            row = {column: _decode(value) for column, value in raw.items()}
            row |= {"premise": row["context"]} if "context" in row else {}
            row |= {"label": label_names[row["label"]]} if "label" in row else {}
            examples.append(_released_example(row, dataset, f"tfds_{source_split}", number))
    if dataset == "cqa":
        return [
            dataclasses.replace(example, split="test") if example.split == "validation" else example
            for example in examples
        ]
    return examples


def _read_released_split(path: Path, dataset: str, word: str) -> list[Example]:
    problems: list[str] = []

    def to_example(row: dict, number: int) -> Example:
        return _released_example(row, dataset, word, number)

    return _collect(path, _read_json(path, problems), to_example, problems)


def _released_example(row: dict, dataset: str, source_split: str, number: int) -> Example:
    """Builds the example of one row; raises ValueError for what the row lacks."""
    if dataset == "svamp":
        _require_columns(row, ["input", "label"])
        text, label = _text(row, "input"), _text(row, "label")
    elif dataset == "cqa":
        _require_columns(row, ["question", "choices", "answer"])
        label = _text(row, "answer").strip()
        text = choice_input(_text(row, "question"), _choices(row, label))
    else:
        _require_columns(row, ["premise", "hypothesis", "label"])
        text = nli_input(_text(row, "premise"), _text(row, "hypothesis"))
        label = _nli_label(row["label"])
    return Example(
        id=f"{dataset}-{source_split}-{number}",
        dataset=dataset,
        split=SPLIT_OF_WORD[source_split.removeprefix("tfds_")],
        input=text,
        label=label,
        answer_form="equation" if dataset == "svamp" else "text",
    )


def _choices(row: dict, label: str) -> list[str]:
    choices = row["choices"]
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"column 'choices' is {choices!r}; expected a list of texts")
    if label not in [choice.strip() for choice in choices]:
        raise ValueError(f"answer {label!r} is none of the choices {choices}")
    return choices


def _nli_label(label) -> str:
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(NLI_LABELS):
        return NLI_LABELS[label]
    if isinstance(label, str) and label in NLI_LABELS:
        return label
    names = ", ".join(f"{name} ({index})" for index, name in enumerate(NLI_LABELS))
    raise ValueError(f"label is {label!r}; expected one of {names}")


def _nli_label_of(name: str) -> str:
    """The label that TFDS calls by its name (e-SNLI) or its first letter (ANLI)."""
    return next(label for label in NLI_LABELS if label == name or label[0] == name)


def _collect(
    path: Path,
    rows: Iterator[tuple[str, dict]],
    to_example: Callable[[dict, int], Example],
    problems: list[str],
) -> list[Example]:
    """Builds an example a row, and raises the first twenty rows' faults together."""
    examples: list[Example] = []
    place_of_id: dict[str, str] = {}
    for number, (place, row) in enumerate(rows):
        try:
            example = to_example(row, number)
            if example.id in place_of_id:
                raise ValueError(
                    f"id {example.id!r} is that of {place_of_id[example.id]}; ids must be unique"
                )
        except ValueError as error:
            problems.append(f"{place}: {error}")
            if len(problems) >= MAX_PROBLEMS:
                break
            continue
        place_of_id[example.id] = place
        examples.append(example)
    raise_problems(path, problems)
    if not examples:
        raise InputError(f"{path}: has no rows; expected one example a row")
    return examples


def _read_json(path: Path, problems: list[str]) -> Iterator[tuple[str, dict]]:
    """Yields (place, row) of a JSONL file, or of a file that is one JSON list of objects."""
    try:
        with path.open("rb") as file:
            head = file.read(256).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected JSON rows") from None
    if not head.startswith(b"["):
        for number, row in read_json_lines(path, problems):
            yield f"{path}:{number}", row
        return
    try:
        rows = strict_json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise InputError(f"{path}: not a JSON list ({error}); expected a list of objects") from None
    for number, row in enumerate(rows, start=1):
        if isinstance(row, dict):
            yield f"{path}: item {number}", row
        else:
            problems.append(f"{path}: item {number}: is no JSON object; expected an object a row")
            if len(problems) >= MAX_PROBLEMS:
                return


def _read_csv(
    path: Path, columns: Sequence[str], problems: list[str]
) -> Iterator[tuple[str, dict]]:
    """Yields (place, row) of a CSV file with a header; ragged rows go to `problems`.

    A place is the line where the row ends, because a quoted cell may span lines. An empty cell is
    None.
    """
    csv.field_size_limit(_MAX_CSV_FIELD_CHARACTERS)
    reader = csv.reader(io.StringIO(_decode_file(path), newline=""), strict=True)
    header: list[str] | None = None
    while len(problems) < MAX_PROBLEMS:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            problems.append(f"{path}:{reader.line_num}: not CSV ({error})")
            return
        if cells is None:
            break
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            _check_header(path, header, columns)
        elif len(cells) != len(header):
            problems.append(
                f"{path}:{reader.line_num}: {len(cells)} cells; expected {len(header)}, as the "
                "header has (a text with a comma must stand in double quotes)"
            )
        else:
            cells = [cell if cell.strip() else None for cell in cells]
            yield f"{path}:{reader.line_num}", dict(zip(header, cells, strict=True))
    if header is None and not problems:
        raise InputError(f"{path}: is empty; expected a header line and a row an example")


def _check_header(path: Path, header: list[str], columns: Sequence[str]) -> None:
    """Raises InputError, at once, for what would be wrong in every row."""
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise InputError(f"{path}:1: column {twice[0]!r} occurs twice; rename one of the two")
    try:
        _require_columns(dict.fromkeys(header), columns)
    except ValueError as error:
        raise InputError(f"{path}:1: {error}") from None


def _decode_file(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a table") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path}:{line}: byte {raw[error.start]:#04x} is not UTF-8; save the file as UTF-8 "
            "(in a spreadsheet: 'CSV UTF-8')"
        ) from None


def _require_columns(row: dict, columns: Sequence[str]) -> None:
    """Raises ValueError that names the columns found and the nearest to each missing one."""
    for column in columns:
        if column not in row:
            near = difflib.get_close_matches(column, row, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"column {column!r} is missing; found {', '.join(map(repr, row)) or 'none'}{hint}"
            )


def _text(row: dict, column: str) -> str:
    """The column's text; raises ValueError if it is not text, is blank or is absent."""
    value = row[column]
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, (bool, int, float)):
        raise ValueError(
            f"column {column!r} is {json.dumps(value)}, which is not text; write it in double "
            f'quotes, "{json.dumps(value)}", or a class id as the name of its class'
        )
    found = "empty" if value is None or value == "" else f"{value!r}"
    raise ValueError(f"column {column!r} is {found}; expected text")


def _optional_text(row: dict, column: str | None) -> str | None:
    return None if column is None or row[column] is None else _text(row, column)


def _split_word(row: dict, column: str) -> str:
    word = _text(row, column).strip().lower()
    if word not in SPLIT_OF_WORD:
        raise ValueError(
            f"column {column!r} is {word!r}; expected one of {', '.join(SPLIT_OF_WORD)}"
        )
    return word


def _join_inputs(row: dict, columns: Sequence[str]) -> str:
    if len(columns) == 1:
        return _text(row, columns[0])
    return " ".join(f"{column}: {_text(row, column)}" for column in columns)


def _decode(value):
    """TFDS gives bytes for text and an array of them for a sequence of texts."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray):
        return [_decode(item) for item in value.tolist()]
    return int(value) if isinstance(value, np.integer) else value
