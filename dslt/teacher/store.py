"""The completions of an output directory: appended before anything is done with them, never lost.

May import dslt.errors. `completions.jsonl` holds a line an event, and is only ever appended to:

    {"event": "sent", "key": ...}               before a request leaves
    {"event": "answer", "key": ..., "text": ...}   what came back
    {"event": "failure", "key": ..., "reason": ...}   what did not, after the last attempt

A key is the hash of a request and of the number of its sample. A line is written by one system
call, so a killed process leaves at most a torn last line, which is cut off when the store is opened
again. Data is forced to disk (fsync) once a second and at the end: SIGKILL loses nothing, a power
cut at most the last second.

    with CompletionStore("runs/anli/records") as store:
        store.mark_sent(key)
        store.add_answer(key, Answer(text="...", model="..."))
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import time
import typing
from collections.abc import Iterable
from pathlib import Path

from dslt import strict_json
from dslt.errors import InputError
from dslt.files import naming_full_disk

COMPLETIONS = "completions.jsonl"
LOCK = ".lock"
FSYNC_SECS = 1.0
EVENT_START = b'{"event": "'


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What a teacher said to one request.

    Attributes:
      text: the completion, as it came.
      model: who says to have answered; may be more exact than the model that was asked.
      reasoning: what a reasoning model thought beside its answer, or None.
      finish_reason: `stop`, `length`, `content_filter`, ..., or None.
      input_tokens, output_tokens: what was paid; 0 where nobody counted. The first sample of a
        request carries them.
    """

    text: str
    model: str = ""
    reasoning: str | None = None
    finish_reason: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0


class CompletionStore:
    """An output directory's completions, open in one process at a time.

    Attributes:
      answers: by key.
      failures: the last reason by key, of what has no answer.
      in_flight: keys that were sent and have neither; after opening, those of a killed process.
      repeats: how often such a key was sent again, over all runs.
      torn_bytes: cut off a half-written last line at opening.
    """

    def __init__(self, directory: str | os.PathLike):
        """Opens or makes the store, locks it and reads it through.

        Raises:
          InputError: another process has it, or a line that is not the last cannot be read.
        """
        self.directory = Path(directory)
        self.path = self.directory / COMPLETIONS
        self.answers: dict[str, Answer] = {}
        self.failures: dict[str, str] = {}
        self.in_flight: set[str] = set()
        self.repeats = 0
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.directory / LOCK)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            self.torn_bytes = self._read()
        except BaseException:
            os.close(self._lock)
            raise
        self._size = os.fstat(self._file).st_size
        self._synced = time.monotonic()

    def mark_sent(self, keys: Iterable[str]) -> None:
        """Writes down that requests are about to leave."""
        rows = [{"event": "sent", "key": key} for key in keys]
        self._append(rows)
        for row in rows:
            self._take(row)

    def add_answer(self, key: str, answer: Answer) -> bool:
        """Appends an answer; False, and nothing is written, if the key has one already."""
        if key in self.answers:
            return False
        fields = {
            field.name: value
            for field in dataclasses.fields(Answer)
            if (value := getattr(answer, field.name)) or field.name == "text"
        }
        row = {"event": "answer", "key": key, **fields}
        self._append([row])
        self._take(row)
        return True

    def add_failure(self, key: str, reason: str) -> None:
        """Appends that a request came to nothing."""
        row = {"event": "failure", "key": key, "reason": reason}
        self._append([row])
        self._take(row)

    def close(self) -> None:
        """Forces everything to disk and lets the next process in."""
        with contextlib.suppress(OSError):  # a full disk was reported where it was written
            os.fsync(self._file)
        os.close(self._file)
        os.close(self._lock)

    def __enter__(self) -> "CompletionStore":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _append(self, rows: list[dict]) -> None:
        """Writes whole lines or, where the disk is full, nothing."""
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        left = memoryview(data.encode("utf-8", "replace"))
        size = len(left)
        with naming_full_disk(self.path):
            try:
                while left:
                    left = left[os.write(self._file, left) :]
            except OSError:
                os.ftruncate(self._file, self._size)
                raise
        self._size += size
        now = time.monotonic()
        if now - self._synced > FSYNC_SECS:
            os.fsync(self._file)
            self._synced = now

    def _read(self) -> int:
        """Takes all lines, ends a whole last one, cuts off a torn one; returns the bytes cut."""
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                is_ended = line.endswith(b"\n")
                try:
                    self._take(strict_json.loads(line))
                except (ValueError, KeyError, TypeError) as error:
                    if not is_ended and _is_torn(line):
                        os.ftruncate(self._file, os.fstat(self._file).st_size - len(line))
                        return len(line)
                    raise InputError(
                        f"{self.path}:{number}: is no event of a store ({error!r}); the file was "
                        "changed by something else. Restore it, or take that line out"
                    ) from None
                if not is_ended:
                    os.write(self._file, b"\n")
                    break
        return 0

    def _take(self, row: dict) -> None:
        """Takes one event into account."""
        event, key = row["event"], _checked(row, "key", str)
        if event == "sent":
            self.repeats += key in self.in_flight
            self.in_flight.add(key)
            return
        self.in_flight.discard(key)
        if event == "answer":
            fields = {
                name: _checked(row, name, _FIELD_TYPES[name])
                for name in row
                if name not in ("event", "key")
            }
            self.answers.setdefault(key, Answer(**fields))
            self.failures.pop(key, None)
        elif event == "failure":
            if key not in self.answers:
                self.failures[key] = _checked(row, "reason", str)
        else:
            raise ValueError(f"event {event!r}")


_FIELD_TYPES = typing.get_type_hints(Answer)


def _checked(row: dict, name: str, kind: type) -> object:
    """A field of an event; raises ValueError where it is of another kind."""
    value = row[name]
    if not isinstance(value, kind) or isinstance(value, bool) or (kind is int and value < 0):
        raise ValueError(f"{name} is {value!r}")
    return value


def _is_torn(line: bytes) -> bool:
    """Whether a last line without its end is what a kill or a power cut leaves of an event."""
    try:
        strict_json.loads(line)
    except ValueError:
        is_begun = line.startswith(EVENT_START) or EVENT_START.startswith(line)
        return is_begun or not line.strip(b"\0")
    return False


def has_store(directory: str | os.PathLike) -> bool:
    """Whether a directory holds completions."""
    return (Path(directory) / COMPLETIONS).exists()


def _lock(path: Path) -> int:
    """Locks a directory for this process; returns the descriptor that holds the lock."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(lock, 32).decode("ascii", "replace").strip() or "unknown"
        os.close(lock)
        raise InputError(
            f"{path.parent}: is being written by process {owner}; one extraction at a time works "
            "on an output directory. Wait for it, or choose another --output_dir (--shard divides "
            "one job over several)"
        ) from None
    except OSError as error:
        os.close(lock)
        raise InputError(
            f"{path.parent}: this file system has no locks ({error.strerror}), so two extractions "
            "could pay for the same answers; choose an --output_dir on another one"
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock
