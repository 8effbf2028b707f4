"""The loop under disturbance: signals, other devices, other configs, numbers that are not finite.

Every run has the same six steps on a student of 16 dimensions, dropout and packing on.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dslt import config, distributed, evaluate, train
from dslt.checkpoint import student
from dslt.checkpoint.manager import finished_steps
from dslt.core import losses
from dslt.core.batch import Batch, BatchCounts, empty_batch
from dslt.core.continuous import ContinuousDecoder
from dslt.core.sharding import MeshConfig, make_mesh
from dslt.core.t5 import T5Config
from dslt.core.train_step import StepMetrics
from dslt.data import token_cache
from dslt.data.pipeline import TrainStream
from dslt.evaluate import EvalConfig, Silence
from dslt.main import main
from dslt.nonfinite import read_batch
from dslt.signals import INTERRUPTED
from dslt.step_log import FEWEST_ROWS, LogInterval
from dslt.workdir import RunDir, read_json, read_json_rows

NUM_STEPS = 6
BAD_STEP = 4
SMALL = (
    "t5.T5Config.d_model = 16",
    "t5.T5Config.d_kv = 4",
    "t5.T5Config.d_ff = 32",
    "t5.T5Config.num_heads = 4",
    "t5.T5Config.num_layers = 1",
    "t5.T5Config.num_decoder_layers = 1",
    "t5.T5Config.dropout_rate = 0.2",
    "pipeline.DataConfig.batch_examples = 9",
    "pipeline.DataConfig.source_length = 96",
    f"train.TrainConfig.num_steps = {NUM_STEPS}",
    "train.TrainConfig.save_every_steps = 5",
    "train.TrainConfig.log_every_steps = 1",
    "evaluate.EvalConfig.max_label_length = 8",
    "evaluate.EvalConfig.poll_secs = 0.01",
)
SKIP = "train.TrainConfig.on_nonfinite = 'skip'"
EVERY_THIRD = "train.TrainConfig.log_every_steps = 3"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def records(base):
    sizes = ["--train", "60", "--validation", "4", "--test", "0"]
    args = ["--dataset", "facts", "--teacher", "scripted", *sizes]
    assert main(["extract", *args, "--output_dir", str(base / "records")]) == 0
    return base / "records" / "records.jsonl"


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    """A function that sets how many devices there are; one until it is called."""
    found = jax.devices()

    def set_number(number: int) -> None:
        monkeypatch.setattr(jax, "devices", lambda *_: found[:number])

    set_number(1)
    return set_number


def train_args(records, run: Path, *overrides):
    bindings = (f"pipeline.DataConfig.records = ({str(records)!r},)", *SMALL, *overrides)
    gin = [part for binding in bindings for part in ("--gin", binding)]
    files = ["runs/step_by_step.gin", "settings/facts.gin"]
    return ["train", *files, "--run_dir", str(run), *gin]


@pytest.fixture(scope="module")
def undisturbed(base, records):
    with pytest.MonkeyPatch.context() as patch:
        one = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *_: one)
        assert main(train_args(records, base / "undisturbed")) == 0
    return RunDir(base / "undisturbed")


def params_of(run: RunDir, step: int | None = None) -> dict:
    step = step or finished_steps(run.checkpoints)[-1]
    return jax.device_get(student.load(run.checkpoints / str(step), make_mesh(MeshConfig()))[-1])


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def interrupt_at(monkeypatch, where, name: str, number=signal.SIGTERM):
    """The signal comes as the function is called for the first time."""
    original = getattr(where, name)
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(where, name, interrupted)


def logged_steps(run: RunDir) -> list[int]:
    return [row["step"] for row in read_json_rows(run.metrics)]


# ------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("where", "name"), [(token_cache, "_build_task"), (train, "compile_step")])
def test_a_signal_before_the_first_step_ends_the_start(
    where, name, number, records, tmp_path, monkeypatch, capsys
):
    cache = f"pipeline.DataConfig.cache_dir = {str(tmp_path / 'cache')!r}"
    with monkeypatch.context() as patch:
        interrupt_at(patch, where, name, number=number)
        assert main(train_args(records, tmp_path / "run", cache)) == INTERRUPTED
    assert f"stopped on {number.name}; what was finished is saved" in capsys.readouterr().err
    run = RunDir(tmp_path / "run")
    assert not run.has_checkpoints() and run.state() in (None, "stopped")
    left = list((tmp_path / "cache").iterdir())
    assert not [path for path in left if path.is_dir() and path.name.startswith(".")]
    assert main(train_args(records, run.path, cache)) == 0
    assert logged_steps(run) == list(range(1, NUM_STEPS + 1))


def test_a_signal_while_xla_compiles_ends_the_process_in_order(records, tmp_path):
    """Python's own ending, beside a thread that compiles, is a crash."""
    endless = "train.TrainConfig.num_steps = 1000000"
    program = [sys.executable, "-m", "dslt.main", *train_args(records, tmp_path / "run", endless)]
    with subprocess.Popen(
        program,
        env=os.environ | {"XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while "Starting from scratch" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(2.0)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == INTERRUPTED, errors
    assert "stopped on SIGTERM" in errors


def test_a_start_that_failed_may_be_mended(records, tmp_path, capsys):
    run = RunDir(tmp_path / "run")
    missing = f"train.TrainConfig.init_from = {str(tmp_path / 'missing')!r}"
    assert main(train_args(records, run.path, missing)) == 2
    assert "missing" in capsys.readouterr().err and run.state() == "stopped"
    assert main(train_args(records, run.path)) == 0
    shutil.rmtree(run.checkpoints)
    assert main(train_args(records, run.path)) == 2
    assert "holds an earlier training" in capsys.readouterr().err


@pytest.mark.parametrize("warmup_steps", [NUM_STEPS - 1, NUM_STEPS])
def test_a_warm_up_as_long_as_the_run_is_said(warmup_steps, records, tmp_path, capsys):
    overrides = (
        f"optimizer.OptimizerConfig.warmup_steps = {warmup_steps}",
        f"train.TrainConfig.init_from = {str(tmp_path / 'missing')!r}",  # ends it after the start
    )
    assert main(train_args(records, tmp_path / "run", *overrides)) == 2
    is_said = "warning: the learning rate rises for 6 steps" in capsys.readouterr().out
    assert is_said == (warmup_steps == NUM_STEPS)


def test_a_users_own_config_is_not_replaced_by_a_runs(records, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = Path("config.gin")
    text = "include 'runs/step_by_step.gin'\n"
    own.write_text(text)
    args = train_args(records, Path("."))
    assert main(["train", str(own), *args[2:]]) == 2
    assert "config.gin: there is no run.json beside it" in capsys.readouterr().err
    assert main(args) == 2 and own.read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == [".train.lock", "config.gin"]


def test_what_devices_cannot_do_is_refused_before_anything_is_written(
    undisturbed, records, tmp_path, capsys
):
    run = RunDir(Path(shutil.copytree(undisturbed.path, tmp_path / "run")))
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert main(train_args(records, run.path, "sharding.MeshConfig.data = 3")) == 2
    assert "3 devices" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_a_signal_in_a_step_is_said_with_the_place_of_the_checkpoint(
    undisturbed, records, tmp_path, monkeypatch, capsys
):
    run = RunDir(tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt_at(patch, distributed.AnyProcess, "ask", number=signal.SIGINT)
        assert main(train_args(records, run.path)) == INTERRUPTED
    assert f"SIGINT after step 2: saved in {run.checkpoints / '2'}" in capsys.readouterr().out
    assert main(train_args(records, run.path)) == 0
    assert_same(params_of(run), params_of(undisturbed))
    assert logged_steps(run) == list(range(1, NUM_STEPS + 1))


@pytest.mark.parametrize(
    ("where", "name", "binding"),
    [
        (ContinuousDecoder, "__call__", "answers = 'open'"),
        (ContinuousDecoder, "score", "answers = 'likelihood'"),
        (evaluate.time, "sleep", "answers = 'open'"),
    ],
    ids=["decode", "likelihood", "follow"],
)
def test_a_signal_ends_an_evaluation(
    where, name, binding, undisturbed, tmp_path, monkeypatch, capsys
):
    run = RunDir(Path(shutil.copytree(undisturbed.path, tmp_path / "run")))
    run.update_info(state="running")
    gin = [
        f"evaluate.EvalConfig.{text}" for text in (binding, "labels = ('neutral', 'entailment')")
    ][: 1 + ("likelihood" in binding)]
    interrupt_at(monkeypatch, where, name)
    args = [part for text in gin for part in ("--gin", text)]
    assert main(["evaluate", "--run_dir", str(run.path), "--follow", *args]) == INTERRUPTED
    assert "stopped on SIGTERM" in capsys.readouterr().err
    judged = [row["step"] for row in read_json_rows(run.evaluations)]
    assert judged == ([5, 6] if name == "sleep" else [])


def test_a_signal_ends_predictions(undisturbed, tmp_path, monkeypatch, capsys):
    (tmp_path / "inputs.txt").write_text("premise: ann has a cup .\n")
    interrupt_at(monkeypatch, ContinuousDecoder, "__call__")
    args = ["--student", str(undisturbed.path), str(tmp_path / "inputs.txt")]
    assert main(["predict", *args]) == INTERRUPTED
    captured = capsys.readouterr()
    assert "stopped on SIGTERM\n" in captured.err and not captured.out


# ----------------------------------------------------------------------------- other devices


def test_a_run_goes_on_on_other_numbers_of_devices(
    undisturbed, records, tmp_path, monkeypatch, devices
):
    """1, 2 and 4 devices, three meshes: the same batches in the same order, and losses that differ
    by float32 sums in another order alone.
    """
    run = RunDir(tmp_path / "run")
    batches = []
    put_batch = train.put_batch

    def recorded(batch, mesh, rows, num_rows):
        batches.append(batch)
        return put_batch(batch, mesh, rows, num_rows)

    monkeypatch.setattr(train, "put_batch", recorded)
    for number, bindings, stops in (
        (1, (), True),
        (2, ("sharding.MeshConfig.fsdp = 2",), True),
        (4, ("sharding.MeshConfig.fsdp = 2", "sharding.MeshConfig.tensor = 2"), False),
    ):
        devices(number)
        with monkeypatch.context() as patch:
            if stops:
                interrupt_at(patch, distributed.AnyProcess, "ask")
            expected = INTERRUPTED if stops else 0
            assert main(train_args(records, run.path, *bindings)) == expected
    assert logged_steps(run) == list(range(1, NUM_STEPS + 1))
    for row, alone in zip(
        read_json_rows(run.metrics), read_json_rows(undisturbed.metrics), strict=True
    ):
        assert row["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert row["label_tokens"] == alone["label_tokens"]
    changes = read_json(run.info)["config_changes"]
    assert changes[0] == ["sharding.MeshConfig.fsdp: was 1, now 2"]

    devices(1)
    batches_alone = batches.copy()
    batches.clear()
    assert main(train_args(records, tmp_path / "again")) == 0
    for found, expected in zip(batches_alone, batches, strict=True):
        rows = len(expected.decoder_target_tokens)
        for array, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(array[:rows], other)


def test_two_processes_do_not_train_in_one_directory(undisturbed, records, tmp_path, capsys):
    run = RunDir(Path(shutil.copytree(undisturbed.path, tmp_path / "run")))
    before = {path: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    more = [*train_args(records, run.path), "--gin", "train.TrainConfig.log_every_steps = 2"]
    with run.held("train"):
        assert main(more) == 2
        assert f"{run.path}: another `dslt train` works here" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.path.iterdir() if path.is_file()} == before
    assert main(more) == 0


# ---------------------------------------------------------------------------------- branches


def test_a_branch_goes_on_with_another_config_and_leaves_the_run_alone(
    undisturbed, records, tmp_path, capsys
):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.path.rglob("*")}
    changed = "train.TrainConfig.num_steps = 8"
    assert main(train_args(records, undisturbed.path, changed)) == 2
    message = capsys.readouterr().err
    assert "train.TrainConfig.num_steps: was 6, now 8" in message
    assert f"--branch_from {undisturbed.path}" in message

    branch = RunDir(tmp_path / "branch")
    args = [*train_args(records, branch.path, changed), "--branch_from", str(undisturbed.path)]
    assert main(args) == 0
    assert f"after step {NUM_STEPS}" in capsys.readouterr().out
    assert logged_steps(branch) == [7, 8] and finished_steps(branch.checkpoints)[-1] == 8
    came_from = {"checkpoints": str(undisturbed.checkpoints), "step": NUM_STEPS}
    assert read_json(branch.info)["branched_from"] == came_from
    assert main(args) == 0  # the same command resumes, here what is finished
    assert {path: path.stat().st_mtime_ns for path in undisturbed.path.rglob("*")} == before


def test_a_branch_without_a_change_ends_with_the_same_bits(undisturbed, records, tmp_path):
    """So the optimizer's state and the step come along."""
    branch = RunDir(tmp_path / "branch")
    args = train_args(records, branch.path)
    assert main([*args, "--branch_from", str(undisturbed.checkpoints / "5")]) == 0
    assert logged_steps(branch) == [NUM_STEPS]
    assert_same(params_of(branch), params_of(undisturbed))


@pytest.mark.parametrize(
    ("binding", "is_allowed"),
    [
        ("train.TrainConfig.log_every_steps = 2", True),
        ("train.TrainConfig.keep_checkpoints = 9", True),
        ("evaluate.EvalConfig.rows = 3", True),
        ("t5.T5Config.remat = True", True),
        ("t5.T5Config.dropout_rate = 0.1", False),
        ("train.TrainConfig.seed = 1", False),
        ("optimizer.OptimizerConfig.learning_rate = 1e-4", False),
        ("pipeline.DataConfig.batch_examples = 8", False),
    ],
)
def test_what_does_not_change_the_result_may_change(
    binding, is_allowed, undisturbed, records, tmp_path, capsys
):
    run = RunDir(Path(shutil.copytree(undisturbed.path, tmp_path / "run")))
    assert main(train_args(records, run.path, binding)) == (0 if is_allowed else 2)
    name = binding.split(" ")[0]
    captured = capsys.readouterr()
    assert f"{name}: was " in (captured.out if is_allowed else captured.err)


@pytest.mark.parametrize(("schedule", "is_allowed"), [("constant", True), ("cosine", False)])
def test_more_steps_are_a_resumption_where_the_learning_rate_does_not_depend_on_them(
    schedule, is_allowed, undisturbed
):
    bindings = [f"optimizer.OptimizerConfig.schedule = {schedule!r}"]
    was = config.parse([str(undisturbed.config)], bindings)
    now = config.parse([str(undisturbed.config)], [*bindings, "train.TrainConfig.num_steps = 8"])
    (change,) = config.find_changes(was, now)
    assert str(change) == "train.TrainConfig.num_steps: was 6, now 8"
    assert change.is_allowed == is_allowed


def test_what_cannot_be_branched_from_is_one_message(undisturbed, records, tmp_path, capsys):
    args = train_args(records, tmp_path / "run")
    assert main([*args, "--branch_from", str(tmp_path)]) == 2
    assert "has no checkpoint with optimizer state to branch from" in capsys.readouterr().err
    init = f"train.TrainConfig.init_from = {str(undisturbed.path)!r}"
    both = [*train_args(records, tmp_path / "run", init), "--branch_from", str(undisturbed.path)]
    assert main(both) == 2
    assert "expected one of them" in capsys.readouterr().err
    branch = ["--branch_from", str(undisturbed.path)]
    ended = tmp_path / "ended"
    assert main([*train_args(records, ended), *branch]) == 2
    message = f"begins at step {NUM_STEPS}, and train.TrainConfig.num_steps is {NUM_STEPS}"
    assert message in capsys.readouterr().err
    more = f"train.TrainConfig.num_steps = {NUM_STEPS + 1}"
    assert main([*train_args(records, ended, more), *branch]) == 0
    capsys.readouterr()
    for number, rule in enumerate(("name = 'adafactor'", "weight_decay = 0.1")):
        changed = f"optimizer.OptimizerConfig.{rule}"
        args = train_args(records, tmp_path / str(number), changed)
        assert main([*args, *branch]) == 2
        message = capsys.readouterr().err
        assert "its optimizer's state is of another kind" in message
        newest = undisturbed.checkpoints / str(NUM_STEPS)
        assert f"train.TrainConfig.init_from = '{newest}'" in message


# ----------------------------------------------------------------------------------- numbers


def poison(monkeypatch, *steps: int):
    """The batches of these steps have infinite weights, and so a loss that is not a number."""
    original = TrainStream.batch

    def poisoned(self, step, rows=None):
        batch = original(self, step, rows)
        if step + 1 not in steps:
            return batch
        weights = batch.decoder_loss_weights * np.float32(np.inf)
        return batch._replace(decoder_loss_weights=weights)

    monkeypatch.setattr(TrainStream, "batch", poisoned)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_run_stops_before_a_step_that_is_not_finite(
    undisturbed, records, tmp_path, monkeypatch, capsys
):
    """Seen two steps later, when a row is logged; the state is that before the step none the less,
    and the run goes on from it to the same bits once the fault is mended.
    """
    run = RunDir(tmp_path / "run")
    with monkeypatch.context() as patch:
        poison(patch, BAD_STEP)
        assert main(train_args(records, run.path, EVERY_THIRD)) == 2
        message = capsys.readouterr().err
        assert f"step {BAD_STEP}: loss nan" in message and "Traceback" not in message
        assert "'skip'" in message and run.state() == "stopped"
        step, batch, examples = read_batch(run.nonfinite(BAD_STEP))
        assert step == BAD_STEP and len(examples) == 9
        assert examples[0] in message and examples[0].startswith("facts/")
        assert np.isnan(batch.decoder_loss_weights).any()
        assert finished_steps(run.checkpoints) == [BAD_STEP - 1]

        assert main(["replay", str(run.nonfinite(BAD_STEP))]) == 0
        lines = capsys.readouterr().out
        assert f"parameters after step {BAD_STEP - 1}, 9 examples" in lines
        assert "loss nan" in lines and "every parameter is finite" in lines
        assert "gradient decoder/" in lines
        assert main(train_args(records, run.path, EVERY_THIRD)) == 2  # it meets it again
    kept = run.nonfinite(BAD_STEP) / "batch.npz"
    whole = kept.read_bytes()
    for part in (whole[:-30], b""):
        kept.write_bytes(part)
        assert main(["replay", str(kept.parent)]) == 2
        assert f"{kept}: cannot be read" in capsys.readouterr().err
    assert main(train_args(records, run.path, EVERY_THIRD)) == 0
    assert_same(params_of(run), params_of(undisturbed))
    rows = logged_steps(run)
    assert rows == sorted(set(rows)) and rows[-1] == NUM_STEPS


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_run_skips_a_step_that_is_not_finite_and_counts_it(
    undisturbed, records, tmp_path, monkeypatch, capsys
):
    run = RunDir(tmp_path / "run")
    poison(monkeypatch, BAD_STEP)
    assert main(train_args(records, run.path, EVERY_THIRD, SKIP)) == 0
    assert f"not finite: step {BAD_STEP}: loss nan" in capsys.readouterr().out
    rows = read_json_rows(run.metrics)
    assert [(row["step"], row["skipped_steps"]) for row in rows] == [(3, 0), (6, 1)]
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params_of(run)))
    assert read_json(run.nonfinite(BAD_STEP) / "report.json")["loss"] == "nan"
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), params_of(run), params_of(undisturbed))
    assert max(jax.tree.leaves(moved)) > 0


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_run_does_not_skip_for_ever(records, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "MAX_SKIPPED_IN_A_ROW", 4)
    poison(monkeypatch, 2, 3, 4, 5, 6)
    run = RunDir(tmp_path / "run")
    assert main(train_args(records, run.path, SKIP)) == 2
    assert "4 steps in a row were not finite" in capsys.readouterr().err
    assert sorted(path.name for path in (run.path / "nonfinite").iterdir()) == ["2", "3", "4", "5"]
    assert finished_steps(run.checkpoints) == [5]


def test_the_same_run_twice_has_the_same_bits(undisturbed, records, tmp_path):
    assert main(train_args(records, tmp_path / "run")) == 0
    run = RunDir(tmp_path / "run")
    for step in (5, 6):
        assert_same(params_of(run, step), params_of(undisturbed, step))
    names = ("loss", "grad_norm", "label_accuracy", "learning_rate")
    rows, others = (
        [[row[name] for name in names] for row in read_json_rows(each.metrics)]
        for each in (run, undisturbed)
    )
    assert rows == others


def step_metrics(loss: float) -> StepMetrics:
    sums = losses.RoleSums(*(np.ones(2, np.float32) for _ in range(3)))
    one, is_finite = np.float32(1.0), np.bool_(np.isfinite(loss))
    return StepMetrics(np.float32(loss), sums, one, is_finite, consistency=np.float32(0.0))


def test_a_loss_spike_is_counted_and_said(capsys):
    """Twice the median of the last rows and half a nat above it; before five rows there is none."""
    interval = LogInterval(T5Config(), 1)
    batch = Batch(*empty_batch(1, 8, 8))

    def row(*step_losses):
        for loss in step_losses:
            row.step += 1
            interval.add(row.step, BatchCounts(1, 2, 3), batch, step_metrics(loss))
        return interval.summary()["loss_spikes"]

    row.step = 0
    assert [row(loss) for loss in (9.0, 2.0, 2.0, 2.0, 2.0)] == [0] * FEWEST_ROWS
    assert row(2.0, 3.9) == 0
    assert row(2.0, 4.1, float("nan"), 8.0) == 2
    out = capsys.readouterr().out
    assert "loss spike: 4.1 at step 9, 2.0 times the median of the last 6 rows" in out
    small = LogInterval(T5Config(), 1, [{"loss": 0.1}] * FEWEST_ROWS)
    small.add(1, BatchCounts(1, 2, 3), batch, step_metrics(0.55))
    small.add(2, BatchCounts(1, 2, 3), batch, step_metrics(0.65))
    assert small.summary()["loss_spikes"] == 1


# ------------------------------------------------------------------------------- a silent trainer


def test_a_follower_says_that_training_is_silent_and_gives_up(undisturbed, tmp_path, capsys):
    """As after SIGKILL: the state is `running`, and no heartbeat comes."""
    run = RunDir(Path(shutil.copytree(undisturbed.path, tmp_path / "run")))
    run.update_info(state="running")
    bindings = ("silence_secs = 0.05", "give_up_secs = 0.3")
    gin = [part for text in bindings for part in ("--gin", f"evaluate.EvalConfig.{text}")]
    assert main(["evaluate", "--run_dir", str(run.path), "--follow", *gin]) == 1
    out = capsys.readouterr().out
    assert out.count("training has given no sign of life") == 1 and "waits no more" in out
    assert "best on validation" in out  # what there was is judged


def test_a_heartbeat_breaks_the_silence(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: now[0])
    run = RunDir(tmp_path)
    silence, settings = Silence(run), EvalConfig(silence_secs=10.0, give_up_secs=100.0)

    def looks(secs: float) -> bool:
        now[0] = secs
        return silence.is_final(settings)

    run.heartbeat.write_text("1")
    assert [looks(secs) for secs in (5.0, 14.0, 16.0, 60.0)] == [False] * 4
    assert "no sign of life for 11 s" in capsys.readouterr().out
    run.heartbeat.write_text("2")
    assert not looks(99.0) and "training goes on" in capsys.readouterr().out
    assert not looks(105.0) and not looks(198.0) and looks(199.5)


def test_a_trainer_beats_while_it_lives(tmp_path):
    run = RunDir(tmp_path)
    with run.beating(every_secs=0.01):
        beats = set()
        while len(beats) < 3:
            if run.heartbeat.exists():
                beats.add(read_json(run.heartbeat)["beats"])
    after = run.heartbeat.read_text()
    assert json.loads(after)["pid"] == os.getpid()
