"""A training that is killed with SIGKILL again and again, beside one that is left alone.

python tests/faults/kill_run.py --kills 20

Each kill waits for its phase, read from what the run writes, and then a random while: in start-up
(before the config is written), in compilation, in the steps, and inside a save, where a temporary
checkpoint directory is there. The trainer's process group dies, and the same command starts it
again. In the end the parameters must be those of the undisturbed run to the bit, and metrics.jsonl
and the event files must have each step once.
"""

import argparse
import collections
import dataclasses
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dslt.checkpoint.manager import finished_steps
from dslt.main import main
from dslt.workdir import RunDir, read_json_rows

ROOT = Path(__file__).parents[2]
PHASES = ("start-up", "compile", "step", "save")
HANG_SECS = 300
SMALL = (
    "t5.T5Config.d_model = 16",
    "t5.T5Config.d_kv = 8",
    "t5.T5Config.d_ff = 32",
    "t5.T5Config.num_heads = 2",
    "t5.T5Config.dropout_rate = 0.2",
    "pipeline.DataConfig.batch_examples = 8",
    "train.TrainConfig.log_every_steps = 1",
)


@dataclasses.dataclass(frozen=True)
class KillReport:
    """What a killed and resumed training left.

    Attributes:
      kills: phase to how many kills hit it.
      resumed_from: after which step each start went on; 0 is from the start.
      unequal: parameters and optimizer arrays that differ from the undisturbed run's in any bit.
      rows, events: steps of metrics.jsonl and of the event files that are not there exactly once.
      num_steps: of the run.
      secs: in all.
    """

    kills: dict[str, int]
    resumed_from: list[int]
    unequal: list[str]
    rows: list[int]
    events: list[int]
    num_steps: int
    secs: float


def make_records(directory: Path) -> Path:
    sizes = ["--train", "60", "--validation", "2", "--test", "2"]
    args = ["--dataset", "facts", "--teacher", "scripted", "--mistake_rate", "0.2", *sizes]
    assert main(["extract", *args, "--output_dir", str(directory)]) == 0
    return directory / "records.jsonl"


def train_command(records: Path, run: Path, num_steps: int, save_every_steps: int) -> list[str]:
    bindings = (
        *SMALL,
        f"pipeline.DataConfig.records = ({str(records)!r},)",
        f"pipeline.DataConfig.cache_dir = {str(run.parent / (run.name + '_cache'))!r}",
        f"train.TrainConfig.num_steps = {num_steps}",
        f"train.TrainConfig.save_every_steps = {save_every_steps}",
    )
    gin = [part for binding in bindings for part in ("--gin", binding)]
    files = ["runs/step_by_step.gin", "settings/facts.gin"]
    return [sys.executable, "-m", "dslt.main", "train", *files, "--run_dir", str(run), *gin]


def start(command: list[str]) -> subprocess.Popen:
    """The command in a process group of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.DEVNULL
    return subprocess.Popen(
        command, env=environment, stdout=output, stderr=output, start_new_session=True
    )


def wait_for(is_reached, process: subprocess.Popen) -> bool:
    """Whether it is reached before the process ends."""
    deadline = time.monotonic() + HANG_SECS
    while process.poll() is None:
        if is_reached():
            return True
        assert time.monotonic() < deadline, "the training hangs"
        time.sleep(0.0005)
    return False


def phase_of(run: RunDir, rows_before: int, beat_before: str) -> str:
    """Which phase the trainer is in, from what it has written since it was started."""
    if _beat(run) == beat_before:
        return "start-up"
    if len(_steps(run)) <= rows_before:
        return "compile"
    return "save" if _is_saving(run) else "step"


def _beat(run: RunDir) -> str:
    try:
        return run.heartbeat.read_text()
    except OSError:
        return ""


def _steps(run: RunDir) -> list[int]:
    try:
        return [row["step"] for row in read_json_rows(run.metrics)]
    except OSError:
        return []


def _is_saving(run: RunDir) -> bool:
    """Orbax writes a checkpoint under another name first; what a kill left goes at the start."""
    try:
        return any(not path.name.isdigit() for path in run.checkpoints.iterdir())
    except OSError:
        return False


def kill_once(command, run: RunDir, aim: str, rng: random.Random) -> tuple[str, int] | None:
    """Starts the training and kills it in a phase; None where it ended first.

    Returns what phase the kill hit, and after which step the training had begun.
    """
    checkpoints = finished_steps(run.checkpoints)
    begun_after = checkpoints[-1] if checkpoints else 0
    rows_before, beat_before = sum(step <= begun_after for step in _steps(run)), _beat(run)

    def is_in(phase: str) -> bool:
        if aim == "save":  # not in the first: then each start gets further
            return phase == aim and finished_steps(run.checkpoints)[-1:] > checkpoints[-1:]
        return phase == aim or (aim == "compile" and phase == "step")

    process = start(command)
    try:
        if aim == "start-up":
            time.sleep(rng.uniform(0.0, 4.0))
        else:
            reached = wait_for(lambda: is_in(phase_of(run, rows_before, beat_before)), process)
            if not reached:
                return None
            time.sleep(rng.uniform(0.0, {"compile": 1.0, "step": 0.3, "save": 0.05}[aim]))
        if process.poll() is not None:
            return None
        hit = phase_of(run, rows_before, beat_before)
        os.killpg(process.pid, signal.SIGKILL)
        return hit, begun_after
    finally:
        process.poll() is None and os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def arrays_of(run: RunDir) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint, optimizer state included, by its path."""
    import jax
    import orbax.checkpoint as ocp

    step = finished_steps(run.checkpoints)[-1]
    arrays = {"step": np.asarray(step)}
    with ocp.StandardCheckpointer() as checkpointer:
        for item in ("params", "opt_state"):
            tree = checkpointer.restore(run.checkpoints.absolute() / str(step) / item)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                arrays[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return arrays


def event_steps(run: RunDir) -> list[int]:
    """The step of each row of scalars in all event files."""
    from tensorboardX.proto.event_pb2 import Event

    from dslt.workdir import _records

    events = [
        Event.FromString(data)
        for path in run.path.glob("events.out.tfevents.*")
        for _, data in _records(path.read_bytes())
    ]
    return [event.step for event in events if event.HasField("summary")]


def not_once(steps: list[int], num_steps: int) -> list[int]:
    count = collections.Counter(steps)
    return [step for step in {*range(1, num_steps + 1), *count} if count[step] != 1]


def run_with_kills(
    directory: Path, *, kills: int, seed: int = 0, aims: Sequence[str] = PHASES
) -> KillReport:
    """Trains undisturbed and with kills, aimed at these phases in turn, and compares what is
    left.
    """
    begun = time.monotonic()
    rng = random.Random(seed)
    num_steps, save_every_steps = 100 * max(kills, 2), 45
    records = make_records(directory / "records")
    undisturbed, killed = RunDir(directory / "undisturbed"), RunDir(directory / "killed")
    command = train_command(records, undisturbed.path, num_steps, save_every_steps)
    assert start(command).wait(HANG_SECS) == 0
    command = train_command(records, killed.path, num_steps, save_every_steps)
    hits, resumed_from = collections.Counter(), []
    for aim in itertools.islice(itertools.cycle(aims), kills):
        hit = kill_once(command, killed, aim, rng)
        assert hit is not None, "the training ended before all kills; give it more steps"
        hits[hit[0]] += 1
        resumed_from.append(hit[1])
        print(f"kill {sum(hits.values())}: {hit[0]}, begun after step {hit[1]}", flush=True)
    last = finished_steps(killed.checkpoints)
    resumed_from.append(last[-1] if last else 0)
    assert start(command).wait(HANG_SECS) == 0
    expected, found = arrays_of(undisturbed), arrays_of(killed)
    unequal = [
        name
        for name in expected.keys() | found.keys()
        if name not in found or name not in expected or not _same_bits(found[name], expected[name])
    ]
    return KillReport(
        kills=dict(hits),
        resumed_from=resumed_from,
        unequal=unequal,
        rows=not_once(_steps(killed), num_steps),
        events=not_once(event_steps(killed), num_steps),
        num_steps=num_steps,
        secs=round(time.monotonic() - begun, 1),
    )


def _same_bits(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.dtype == expected.dtype and found.tobytes() == expected.tobytes()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report = run_with_kills(Path(scratch), **vars(arguments))
        print(report)
        print(f"{sum(report.kills.values())} kills: {report.kills}, in {report.secs} s")
        is_exact = not (report.unequal or report.rows or report.events)
        print("the same bits, each step once" if is_exact else "NOT THE SAME")
        sys.exit(not is_exact)
