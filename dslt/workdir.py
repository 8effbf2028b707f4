"""A run's directory: it alone reproduces the run.

May import the standard library, tensorboardX and its protobuf (no TensorFlow, no JAX).

    RUN/config.gin          the operative config, every default included
    RUN/run.json            versions, commit, data digests, devices, state of the run
    RUN/student.json        how to speak to the student: prefixes and lengths
    RUN/vocabulary/         a copy of the vocabulary
    RUN/heartbeat.json      written every few seconds while training lives
    RUN/metrics.jsonl       a row each `log_every_steps`; the same numbers as TensorBoard events
    RUN/nonfinite/STEP/     the batch of a step whose loss or gradient was not finite
    RUN/checkpoints/        the latest few, with optimizer state
    RUN/evaluations.jsonl   a row each evaluated checkpoint
    RUN/evaluations/STEP/   predictions.jsonl and metrics.json
    RUN/best/               parameters of the best checkpoint on validation
    RUN/damaged/            checkpoints that could not be read, set aside; nothing reads them
"""

import ast
import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import os
import platform
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from dslt import __version__, strict_json
from dslt.errors import InputError
from dslt.files import lock_file, naming_full_disk, replacing, write_text

HEARTBEAT_SECS = 10.0
OVERRIDES = "overrides"  # in a row of evaluations.jsonl: how it was judged, unlike the run's config

_VERSIONED_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "sentencepiece")
_BINDING = re.compile(r"^([\w.]+) = (.*(?:\n[ \t]+.*)*)", re.M)


@dataclasses.dataclass(frozen=True)
class RunDir:
    """The paths of one run."""

    path: Path

    def __post_init__(self):
        scheme, separator, rest = str(self.path).partition(":/")  # Path takes one slash away
        if separator and scheme.isalnum() and len(scheme) > 1:
            raise InputError(
                f"{scheme}://{rest}: a run's directory is a plain path; mount the bucket (gcsfuse "
                "BUCKET DIRECTORY) and name the directory there, as launch/tpu.sh does"
            )

    @property
    def config(self) -> Path:
        return self.path / "config.gin"

    @property
    def info(self) -> Path:
        return self.path / "run.json"

    @property
    def student(self) -> Path:
        return self.path / "student.json"

    @property
    def vocabulary(self) -> Path:
        return self.path / "vocabulary"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def heartbeat(self) -> Path:
        return self.path / "heartbeat.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def best(self) -> Path:
        return self.path / "best"

    def evaluation(self, step: int) -> Path:
        """The directory of one checkpoint's predictions."""
        return self.path / "evaluations" / str(step)

    def nonfinite(self, step: int) -> Path:
        """The directory of a step that was not finite."""
        return self.path / "nonfinite" / str(step)

    def update_info(self, **fields) -> None:
        """Sets fields of run.json and keeps the others."""
        found = read_json(self.info) if self.info.exists() else {}
        write_json(self.info, found | fields)

    def has_checkpoints(self) -> bool:
        """Whether there is something to resume; until then the run may begin anew."""
        return bool(self.checkpoint_steps())

    def checkpoint_steps(self) -> set[int]:
        """Those of the checkpoints on disk, damaged ones included."""
        found = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        return {int(path.name) for path in found if path.name.isdecimal()}

    def set_state(self, state: str, **fields) -> None:
        """Says how far the run has come and, once there are checkpoints, that there were some."""
        if self.has_checkpoints():
            fields["has_saved"] = True
        self.update_info(state=state, **fields)

    def has_saved(self, save_every_steps: int) -> bool:
        """Whether a checkpoint was written once, wherever it is now.

        A run that was killed has not said so, but logs steps beyond its second save only after its
        first is on disk.
        """
        rows = read_json_rows(self.metrics)
        is_past_one = bool(rows) and rows[-1]["step"] > 2 * save_every_steps
        has_said = self.info.exists() and read_json(self.info).get("has_saved", False)
        return has_said or is_past_one

    def state(self) -> str | None:
        """`running`, `stopped` (by a signal or an error, to be resumed), `finished`; None before
        the start. A training that was killed without a word has left `running`.
        """
        return read_json(self.info).get("state") if self.info.exists() else None

    @contextlib.contextmanager
    def held(self, command: str) -> Iterator[None]:
        """Inside, no other process runs the command (`train` or `evaluate`) here; of other hosts,
        where the file system says so.

        Raises:
          InputError: another one does.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / f".{command}.lock").open("a") as file:
            if not lock_file(file):
                raise InputError(
                    f"{self.path}: another `dslt {command}` works here; wait for its end, or stop "
                    "it first"
                )
            yield

    @contextlib.contextmanager
    def beating(self, every_secs: float = HEARTBEAT_SECS) -> Iterator[None]:
        """Inside, a thread changes `heartbeat` as long as this process lives.

        Whoever waits for the run sees by his own clock whether the file changes; so hosts' clocks
        may differ, and the file system needs no locks.
        """
        is_over = threading.Event()

        def beat() -> None:
            who = {"host": socket.gethostname(), "pid": os.getpid()}
            for number in itertools.count():
                with contextlib.suppress(OSError):  # a full disk is the checkpoint's to tell
                    write_json(self.heartbeat, who | {"beats": number, "time": time.time()})
                if is_over.wait(every_secs):
                    return

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()


@dataclasses.dataclass(frozen=True)
class StudentFormat:
    """How to speak to a student: what its inputs begin with and how long they may be, in tokens,
    what a rationale starts with, and what its answer holds.

    The defaults are those of DataConfig, for students that come without a student.json.
    """

    input_prefix_label: str = "predict: "
    input_prefix_rationale: str = "explain: "
    max_input_length: int = 1024
    max_target_length: int = 256
    rationale_start_id: int = 0
    target_layout: str = "label"

    @classmethod
    def read(cls, path: Path) -> "StudentFormat":
        """Raises InputError where the file has other fields or values."""
        found = read_json(path)
        expected = {field.name for field in dataclasses.fields(cls)}
        if not found.keys() <= expected:  # a later version's may be missing, and has a default
            raise InputError(
                f"{path}: found the fields {sorted(found)}, expected {sorted(expected)}"
            )
        for field in dataclasses.fields(cls):
            value = found.get(field.name, field.default)
            if type(value) is not field.type:
                raise InputError(
                    f"{path}: {field.name} is {value!r}; expected {field.type.__name__}"
                )
        format = cls(**found)
        if min(format.max_input_length, format.max_target_length) < 2:
            raise InputError(f"{path}: found {format}; expected lengths of at least 2")
        if format.rationale_start_id < 0:
            raise InputError(f"{path}: found {format}; expected a rationale_start_id from 0 up")
        return format

    def write(self, path: Path) -> None:
        """Writes JSON."""
        write_json(path, dataclasses.asdict(self))


class MetricsWriter:
    """Appends rows to metrics.jsonl and the same numbers to TensorBoard event files.

    Attributes:
      kept: the rows that were there already.
    """

    def __init__(self, run: RunDir, first_step: int):
        """Rows and events from `first_step` on, left by a run that stopped later than its
        checkpoint, go.
        """
        # Not SummaryWriter, which writes in a thread of its own: a kill loses what `flush` flushed,
        # and at a full disk the thread ends and whoever writes then waits for ever.
        from tensorboardX.event_file_writer import EventsWriter  # 0.3 s that `dslt --help` spares
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.kept = [row for row in read_json_rows(run.metrics) if row["step"] < first_step]
        write_json_rows(run.metrics, self.kept)
        for path in run.path.glob("events.out.tfevents.*"):
            _cut_events(path, first_step)
        self._file = run.metrics.open("a", encoding="utf-8")
        suffix = f".{os.getpid()}.{first_step}"  # else two starts in one second share a file
        self._events = EventsWriter(str(run.path / "events"), suffix)
        if first_step > 1:  # a TensorBoard that has read what went forgets it
            start = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(step=first_step, session_log=start))
        self._path = run.metrics

    def write(self, step: int, values: dict[str, float]) -> None:
        """One row, in both files; both are flushed. Raises InputError where the disk is full."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=scalars))
        with naming_full_disk(self._path):
            self._file.write(json.dumps({"step": step} | values) + "\n")
            self._file.flush()
            self._events.write_event(event)
            self._events.flush()

    def close(self) -> None:
        """Closes both files."""
        self._file.close()
        self._events.close()


def _cut_events(path: Path, first_step: int) -> None:
    """Takes the events from a step on out of an event file, and a record that a kill cut off.

    What is damaged goes with all behind it; then the file as it was is set aside.
    """
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event

    content = path.read_bytes()
    kept, end = [], 0
    for record, data in _records(content):
        try:
            event = Event.FromString(data)
        except DecodeError:
            break
        end += len(record)
        if not event.HasField("summary") or event.step < first_step:
            kept.append(record)
    if not _is_cut_off(content[end:]):
        aside = _aside(path)
        print(
            f"warning: {path}: is damaged: what stands from byte {end:,} on is no event, and "
            f"is taken out of it; the file as it was is {aside}",
            file=sys.stderr,
        )
        path.rename(aside)
    if sum(map(len, kept)) < len(content):
        with replacing(path, "wb") as file:
            file.writelines(kept)


def _aside(path: Path) -> Path:
    """A name beside an event file that is still free, and under which TensorBoard reads none."""
    names = (path.name.replace("tfevents", f"damaged{number}") for number in itertools.count(1))
    return next(path.with_name(name) for name in names if not path.with_name(name).exists())


def _records(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The whole records of a TFRecord file, framed and bare.

    A record is its length (uint64), the length's checksum, its bytes, their checksum.
    """
    start = 0
    while start + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        end = start + 12 + length + 4
        if end > len(content):
            return
        yield content[start:end], content[start + 12 : end - 4]
        start = end


def _is_cut_off(rest: bytes) -> bool:
    """Whether a file that ends so lacks but the end of its last record."""
    from tensorboardX.record_writer import masked_crc32c

    if len(rest) < 12:
        return True
    length, checksum = struct.unpack_from("<QI", rest)
    return len(rest) < 12 + length + 4 and checksum == masked_crc32c(rest[:8])


def environment() -> dict:
    """Versions that a result depends on, and the commit if the package runs from a checkout."""
    versions = {name: importlib.metadata.version(name) for name in _VERSIONED_PACKAGES}
    return {
        "dslt": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_json(path: Path) -> dict:
    """Raises InputError where the file is missing or no JSON object."""
    try:
        found = strict_json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object")
    return found


def read_config(path: Path) -> dict:
    """Bindings of an operative gin config that are Python literals, by their full names; none where
    the file cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    values = {}
    for name, literal in _BINDING.findall(text):
        try:
            values[name] = ast.literal_eval(literal.replace("\\\n", "\n").strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue  # a reference, or no gin at all
    return values


def write_json(path: Path, value: dict) -> None:
    """The file appears whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json_rows(path: Path) -> list[dict]:
    """The rows of a file that only this package writes; none where it does not exist.

    A last line without its newline was cut off by a kill and is left out. Raises InputError where
    another line is no object of numbers with an integer `step`.
    """
    return parse_json_rows(path.read_bytes(), path) if path.exists() else []


def parse_json_rows(content: bytes, path: Path | str) -> list[dict]:
    """As `read_json_rows`, of a file's content; `path` is what an error calls it."""
    *lines, _ = content.split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = strict_json.loads(line)
        except ValueError:
            row = None
        if not _is_row(row):
            found = line[:80].decode(errors="replace")
            raise InputError(
                f"{path}:{number}: is no row of this file: found {found!r}, expected a JSON object "
                "of numbers, its step an integer; it was changed by something else. Restore it, or "
                "take that line out"
            )
        rows.append(row)
    return rows


def _is_row(value) -> bool:
    if not isinstance(value, dict) or type(value.get("step")) is not int:
        return False
    texts = [name for name, x in value.items() if type(x) not in (int, float)]
    return not texts or (texts == [OVERRIDES] and type(value[OVERRIDES]) is str)


def best_row(rows: Sequence[dict]) -> dict | None:
    """The row with the highest validation accuracy, the earliest of equals; test plays no role.

    Of rows that were judged with unlike settings those count that are like the newest.
    """
    judged = [row for row in rows if "validation/accuracy" in row]
    newest = max(judged, key=lambda row: row["step"], default={})
    alike = judged_alike(judged, newest.get(OVERRIDES, ""))
    return max(alike, key=lambda row: (row["validation/accuracy"], -row["step"]), default=None)


def judged_alike(rows: Sequence[dict], overrides: str) -> list[dict]:
    """The rows that were judged with these overrides of the run's own settings."""
    return [row for row in rows if row.get(OVERRIDES, "") == overrides]


def judged_steps(rows: Sequence[dict], splits: Collection[str]) -> set[int]:
    """The steps of evaluations.jsonl's rows that were judged on each of these splits; a split
    without gold labels is never judged, and is not to be among them.
    """
    names = {f"{split}/accuracy" for split in splits}
    return {row["step"] for row in rows if names <= row.keys()}


def write_json_rows(path: Path, rows: list[dict]) -> None:
    """The file appears whole or not at all."""
    write_text(path, format_json_rows(rows))


def format_json_rows(rows: list[dict]) -> str:
    """A row a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)
