"""The paper's released completions: `llm/{train,valid,test}_CoT_K.json`, found by example id.

May import dslt.records and dslt.errors.

    completions = read_completions("data/svamp", examples)  # {"svamp-train-0": "Luke scored ..."}
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from dslt import strict_json
from dslt.errors import InputError
from dslt.records import Example

_FILE = re.compile(r"(\w+)_CoT_([0-9]+)\.json")
_ID = re.compile(r"[^-]+-(\w+)-([0-9]+)")


def read_completions(directory: str | os.PathLike, examples: Iterable[Example]) -> dict[str, str]:
    """The raw completion of each example, by its id `<dataset>-<source split>-<row>`.

    The files of a split are joined in the order of K as a number (10 after 9), and hold one
    completion a row in the row order of the split. So `examples` must be every row of each of its
    source splits; which of them were held out for validation does not matter.

    Raises:
      InputError: for an id of another form, a missing or unreadable file, a gap in K, or another
        number of completions than of rows.
    """
    ids_by_split: dict[str, dict[int, str]] = {}
    for example in examples:
        match = _ID.fullmatch(example.id)
        if not match:
            raise InputError(
                f"example id {example.id!r} names no row; the released completions are found by "
                "ids like 'svamp-train-0', as `read_released` gives them"
            )
        ids_by_split.setdefault(match[1], {})[int(match[2])] = example.id
    completions: dict[str, str] = {}
    for split, id_of_row in ids_by_split.items():
        of_split = _read_split(Path(directory) / "llm", split)
        if sorted(id_of_row) != list(range(len(of_split))):
            raise InputError(
                f"{Path(directory) / 'llm'}: {len(of_split)} completions of split {split!r}, and "
                f"{len(id_of_row)} rows (up to row {max(id_of_row)}); expected one completion a "
                "row, so check that completions and problems are of the same release"
            )
        completions |= {id_of_row[row]: text for row, text in enumerate(of_split)}
    return completions


def _read_split(directory: Path, split: str) -> list[str]:
    """The completions of `<split>_CoT_0.json`, `<split>_CoT_1.json`, ... one behind the other."""
    numbers = sorted(
        int(match[2])
        for match in map(_FILE.fullmatch, _names_in(directory))
        if match and match[1] == split
    )
    if numbers != list(range(len(numbers))) or not numbers:
        raise InputError(
            f"{directory}: found {split}_CoT_K.json for K = {numbers or 'none'}; expected K = 0, "
            "1, ... without a gap"
        )
    completions: list[str] = []
    for number in numbers:
        path = directory / f"{split}_CoT_{number}.json"
        try:
            texts = strict_json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read ({error}); expected a JSON list") from None
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{path}: is no JSON list of texts; expected one completion a row")
        completions += texts
    return completions


def _names_in(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError as error:
        raise InputError(
            f"{directory}: cannot be read ({error.strerror}); expected the released completions"
        ) from None
