"""The providers' batch format: requests out as JSONL, results back in any order, also in parts.

May import dslt.errors. A request line is `{"custom_id", "method", "url", "body"}`, a result line
`{"custom_id", "response": {"status_code", "body"}, "error"}`; the custom id is a question's key.
"""

import collections
import contextlib
import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from dslt.errors import InputError
from dslt.files import replacing
from dslt.records import raise_problems, read_json_lines
from dslt.teacher.questions import Request
from dslt.teacher.responses import parse_response
from dslt.teacher.store import CompletionStore

MAX_REQUESTS = 50_000  # a file, as providers have it


@dataclasses.dataclass(frozen=True)
class BatchResults:
    """What result files held: `answers` that are new, and lines that are not used, by cause."""

    answers: int
    unused: dict[str, int]


def write_batch(requests: Iterable[Request], path: str) -> list[Path]:
    """Writes a line a request and returns the files: `path`, or `path` numbered if it takes more.

    Args:
      requests: of one sample each, because a result names one question.

    Raises:
      InputError: one of the files is there already.
    """
    lines = [_to_line(request) for request in requests]
    parts = [lines[start : start + MAX_REQUESTS] for start in range(0, len(lines), MAX_REQUESTS)]
    base = Path(path)
    paths = (
        [base]
        if len(parts) == 1
        else [
            base.with_name(f"{base.stem}-{number:04}{base.suffix}") for number in range(len(parts))
        ]
    )
    for each in paths:
        if each.exists():
            raise InputError(f"{each}: is there already and stays; choose another name")
    with contextlib.ExitStack() as stack:  # all of them or none
        files = [stack.enter_context(replacing(each)) for each in paths]
        for file, part in zip(files, parts, strict=True):
            file.write("".join(part))
            file.flush()
    return paths


def read_batch(paths: Sequence[str], store: CompletionStore, keys: set[str]) -> BatchResults:
    """Takes the results of batch files into the store.

    Args:
      keys: of the questions of this job; other results are counted and left.

    Raises:
      InputError: a file cannot be read, or has lines that are no results.
    """
    answers, unused = 0, collections.Counter()
    for path in map(Path, paths):
        problems: list[str] = []
        rows = list(read_json_lines(path, problems))
        problems += [
            f"{path}:{number}: has no custom_id; expected a batch result"
            for number, row in rows
            if not isinstance(row.get("custom_id"), str)
        ][:20]
        raise_problems(path, problems)
        for _, row in rows:
            cause = _take(row, store, keys)
            answers += cause is None
            unused[cause] += cause is not None
    return BatchResults(answers, {cause: count for cause, count in unused.items() if count})


def _to_line(request: Request) -> str:
    (key,) = request.keys
    row = {"custom_id": key, "method": "POST", "url": f"/v1{request.path}", "body": request.body}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _take(row: dict, store: CompletionStore, keys: set[str]) -> str | None:
    """Stores one result; returns why it is not used, or None."""
    key = row["custom_id"]
    if key not in keys:
        return "of another job"
    if key in store.answers:
        return "answered before"
    response = row.get("response")
    response = response if isinstance(response, dict) else {}
    answers = parse_response(response.get("body"))
    if response.get("status_code", 200) != 200 or not answers:
        cause = json.dumps(row.get("error") or response.get("body"))
        store.add_failure(key, f"batch: {cause[:300]}")
        return "failed"
    store.add_answer(key, answers[0])
    return None
