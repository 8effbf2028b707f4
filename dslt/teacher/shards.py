"""Shards of one job, asked on several machines, joined again.

May import dslt.errors. A shard's output directory holds its own store. Answers have the same keys
wherever they were given, so to join is to append what is missing.
"""

import os
import re
from collections.abc import Sequence

from dslt.errors import InputError
from dslt.teacher.questions import Question
from dslt.teacher.store import CompletionStore, has_store


def parse_shard(text: str) -> tuple[int, int]:
    """`2/4` → (2, 4): the second of four."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if found and 1 <= int(found[1]) <= int(found[2]):
        return int(found[1]), int(found[2])
    raise InputError(f"shard is {text[:40]!r}; expected i/n with i from 1 to n, such as 1/4")


def merge_stores(
    store: CompletionStore, directories: Sequence[str | os.PathLike]
) -> dict[str, int]:
    """Appends the answers and failures of other stores; returns how many answers each gave.

    Raises:
      InputError: a directory has no store, or one that is being written.
    """
    taken = {}
    for directory in directories:
        if not has_store(directory):
            raise InputError(
                f"{directory}: has no completions.jsonl; expected the --output_dir of a shard"
            )
        with CompletionStore(directory) as shard:
            taken[str(directory)] = sum(
                store.add_answer(key, answer) for key, answer in shard.answers.items()
            )
            for key, reason in shard.failures.items():
                if key not in store.answers and key not in store.failures:
                    store.add_failure(key, reason)
    return taken


def check_complete(
    questions: Sequence[Question], store: CompletionStore, ids: Sequence[str]
) -> None:
    """Raises InputError if a question has neither an answer nor a failure.

    Args:
      ids: of the examples, by row.
    """
    missing = [
        question
        for question in questions
        if question.key not in store.answers and question.key not in store.failures
    ]
    if missing:
        rows = list(dict.fromkeys(question.row for question in missing))
        raise InputError(
            f"{store.directory}: {len(missing):,} of {len(questions):,} questions were never "
            f"answered, of {len(rows):,} examples ({', '.join(ids[row] for row in rows[:5])}"
            f"{', …' if len(rows) > 5 else ''}); finish every shard, with the same options, and "
            "merge all of them"
        )
