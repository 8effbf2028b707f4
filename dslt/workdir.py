"""A run's directory: it alone reproduces the run.

May import the standard library, numpy and tensorboardX (no TensorFlow, no JAX).

    RUN/config.gin          the operative config, every default included
    RUN/run.json            versions, commit, data digests, devices, state of the run
    RUN/student.json        how to speak to the student: prefixes and lengths
    RUN/vocabulary/         a copy of the vocabulary
    RUN/metrics.jsonl       a row each `log_every_steps`; the same numbers as TensorBoard events
    RUN/checkpoints/        the latest few, with optimizer state
    RUN/evaluations.jsonl   a row each evaluated checkpoint
    RUN/evaluations/STEP/   predictions.jsonl and metrics.json
    RUN/best/               parameters of the best checkpoint on validation
    RUN/damaged/            checkpoints that could not be read, set aside; nothing reads them
"""

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
import time
from pathlib import Path

from dslt import __version__
from dslt.errors import InputError
from dslt.files import naming_full_disk, write_text

_VERSIONED_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "sentencepiece")


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

    def update_info(self, **fields) -> None:
        """Sets fields of run.json and keeps the others."""
        found = read_json(self.info) if self.info.exists() else {}
        write_json(self.info, found | fields)

    def has_checkpoints(self) -> bool:
        """Whether there is something to resume; until then the run may begin anew."""
        steps = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        return any(step.name.isdigit() for step in steps)

    def has_saved(self, save_every_steps: int) -> bool:
        """Whether a checkpoint was written once, wherever it is now.

        A run that ended has saved. One that was killed logs steps beyond its second save only
        after its first is on disk.
        """
        rows = read_json_rows(self.metrics)
        is_past_one = bool(rows) and rows[-1]["step"] > 2 * save_every_steps
        return self.state() in ("finished", "stopped") or is_past_one

    def state(self) -> str | None:
        """`running`, `stopped` (by a signal, to be resumed), `finished`; None before the start."""
        return read_json(self.info).get("state") if self.info.exists() else None


@dataclasses.dataclass(frozen=True)
class StudentFormat:
    """How to speak to a student: what its inputs begin with and how long they may be, in tokens.

    The defaults are those of DataConfig, for students that come without a student.json.
    """

    input_prefix_label: str = "predict: "
    input_prefix_rationale: str = "explain: "
    max_input_length: int = 1024
    max_target_length: int = 256
    rationale_start_id: int = 0

    @classmethod
    def read(cls, path: Path) -> "StudentFormat":
        """Raises InputError where the file has other fields."""
        found = read_json(path)
        expected = {field.name for field in dataclasses.fields(cls)}
        if not found.keys() <= expected:  # a later version's may be missing, and has a default
            raise InputError(
                f"{path}: found the fields {sorted(found)}, expected {sorted(expected)}"
            )
        return cls(**found)

    def write(self, path: Path) -> None:
        """Writes JSON."""
        write_json(path, dataclasses.asdict(self))


class MetricsWriter:
    """Appends rows to metrics.jsonl and the same numbers to TensorBoard event files."""

    def __init__(self, run: RunDir, first_step: int):
        """Rows from `first_step` on, left by a run that stopped later than its checkpoint, go."""
        # 0.3 s that `dslt --help` does not pay. Not SummaryWriter: its thread ends at a full disk,
        # and whoever writes then waits for ever.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        keep = [row for row in read_json_rows(run.metrics) if row["step"] < first_step]
        write_json_rows(run.metrics, keep)
        self._file = run.metrics.open("a", encoding="utf-8")
        self._events = EventsWriter(str(run.path / "events"))
        purge = SessionLog(status=SessionLog.START)  # TensorBoard forgets what came after
        self._events.write_event(Event(step=first_step, wall_time=time.time(), session_log=purge))
        self._path = run.metrics

    def write(self, step: int, values: dict[str, float]) -> None:
        """One row; both files are flushed. Raises InputError where the disk is full."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        with naming_full_disk(self._path):
            self._file.write(json.dumps({"step": step} | values) + "\n")
            self._file.flush()
            for name, value in values.items():
                event = Event(step=step, wall_time=time.time(), summary=scalar(name, value))
                self._events.write_event(event)
            self._events.flush()

    def close(self) -> None:
        """Closes both files."""
        self._file.close()
        self._events.close()


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
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object")
    return found


def write_json(path: Path, value: dict) -> None:
    """The file appears whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json_rows(path: Path) -> list[dict]:
    """The rows of a file that only this package writes; none where it does not exist.

    A last line without its newline was cut off by a kill and is left out.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write_json_rows(path: Path, rows: list[dict]) -> None:
    """The file appears whole or not at all."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
