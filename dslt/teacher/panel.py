"""Several teachers side by side: a JSON file that lists them. May import dslt.errors."""

import json
from collections.abc import Sequence
from pathlib import Path

from dslt import strict_json
from dslt.errors import InputError

NUMBERS = ("weight", "temperature", "mistake_rate")
WHOLE_NUMBERS = ("samples", "max_tokens", "sampling_seed", "samples_per_request", "wording")


def read_teachers(path: str, fields: Sequence[str]) -> list[dict]:
    """Reads a list of teachers, each an object with some of `fields`; numbers and texts checked.

    Raises:
      InputError: the file is no such list, with the entry and the field at fault.
    """
    try:
        entries = strict_json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a JSON list") from None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: is no list of teachers; expected [{{...}}, ...]")
    for number, entry in enumerate(entries):
        place = f"{path}: teacher {number}"
        if not isinstance(entry, dict):
            raise InputError(f"{place} is {entry!r}; expected an object")
        for name, value in entry.items():
            if name not in fields:
                raise InputError(f"{place}: unknown field {name!r}; expected {', '.join(fields)}")
            if name == "extra_body":
                entry[name] = json.dumps(value)
                continue
            kinds = (int,) if name in WHOLE_NUMBERS else (str,)
            kinds = (int, float) if name in NUMBERS else kinds
            if type(value) not in kinds:
                raise InputError(f"{place}: {name} is {value!r}; expected a {kinds[-1].__name__}")
    return entries
