"""Two and four real processes on this machine do what one does: train, stop, resume, evaluate.

Each group of processes runs several commands one after another, because starting it is what takes
time. A group that hangs is killed, and its test fails.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dslt import distributed
from dslt.checkpoint import student
from dslt.checkpoint.manager import finished_steps
from dslt.core.sharding import MeshConfig, make_mesh
from dslt.main import INTERRUPTED, main
from dslt.records import read_examples, read_predictions
from dslt.workdir import RunDir, read_json_rows

NUM_STEPS = 6
STOP_STEP = 3
SMALL = (
    "t5.T5Config.d_model = 16",
    "t5.T5Config.d_kv = 8",
    "t5.T5Config.d_ff = 32",
    "t5.T5Config.num_heads = 2",
    "t5.T5Config.num_layers = 1",
    "t5.T5Config.num_decoder_layers = 1",
    "t5.T5Config.dropout_rate = 0.2",
    "pipeline.DataConfig.batch_examples = 9",  # in rows that no number of devices divides
    "pipeline.DataConfig.source_length = 96",
    f"train.TrainConfig.num_steps = {NUM_STEPS}",
    "train.TrainConfig.accumulation_steps = 2",
    "train.TrainConfig.log_every_steps = 1",
    "evaluate.EvalConfig.rows = 4",
    "evaluate.EvalConfig.max_label_length = 8",
)
# argv: a file of command lines, each perhaps with what befalls this process after which step.
WORKER = """
import json, os, signal, sys
from dslt.distributed import AnyProcess
from dslt.main import main

ask = AnyProcess.ask

def disturb(event, after_step):
    def disturbed(self, *args):
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == after_step and event == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.steps == after_step and event == "raise":
            raise RuntimeError("a fault of this process")
        return ask(self, *args)
    return disturbed

for arguments, *event in json.load(open(sys.argv[1])):
    AnyProcess.ask = disturb(*event) if event else ask
    print("exit status", main(arguments), file=sys.stderr, flush=True)
"""


def run_processes(directory, commands, processes, devices, disturbed=(), limit_secs=120):
    """Runs commands in `processes` processes of `devices` CPU devices each.

    `disturbed` maps (process, number of the command) to an event and the step after which it comes.
    Returns what each process exited with, and wrote to standard output and to standard error.
    """
    directory.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}"),
    }
    flags = []
    if processes > 1:
        environment |= {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(processes),
        }
        flags = ["--distributed", "--start_timeout_secs", "60"]
    running = []
    for process in range(processes):
        script = directory / f"{process}.json"
        script.write_text(
            json.dumps(
                [
                    ([*command, *flags], *dict(disturbed).get((process, number), ()))
                    for number, command in enumerate(commands)
                ]
            )
        )
        with (
            (directory / f"{process}.out").open("w") as out,
            (directory / f"{process}.err").open("w") as err,
        ):
            running.append(
                subprocess.Popen(
                    [sys.executable, "-c", WORKER, str(script)],
                    env=environment | {"JAX_PROCESS_ID": str(process)},
                    stdout=out,
                    stderr=err,
                )
            )
    deadline = time.monotonic() + limit_secs
    try:
        for process in running:
            process.wait(max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        pytest.fail(f"the processes hang; see {directory}")
    finally:
        for process in running:
            process.kill()
    return [
        SimpleNamespace(
            status=process.returncode,
            out=(directory / f"{number}.out").read_text(),
            err=(directory / f"{number}.err").read_text(),
        )
        for number, process in enumerate(running)
    ]


def statuses(process):
    """What each command of one process returned."""
    lines = process.err.splitlines()
    return [int(line.split()[-1]) for line in lines if line.startswith("exit status")]


def train_args(records, run_dir, *overrides):
    bindings = (f"pipeline.DataConfig.records = ({str(records)!r},)", *SMALL, *overrides)
    gin = [part for binding in bindings for part in ("--gin", binding)]
    return ["train", "runs/step_by_step.gin", "settings/facts.gin", "--run_dir", str(run_dir), *gin]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def records(base):
    sizes = ["--train", "60", "--validation", "2", "--test", "5"]
    args = ["--dataset", "facts", "--teacher", "scripted", "--mistake_rate", "0.2"]
    assert main(["extract", *args, *sizes, "--output_dir", str(base / "records")]) == 0
    return base / "records" / "records.jsonl"


@pytest.fixture(scope="module")
def one(base, records):
    """What the other runs are held against: a run of one process, of as many devices as it has."""
    assert main(train_args(records, base / "one")) == 0
    return RunDir(base / "one")


@pytest.fixture(scope="module")
def two(base, records):
    """Two processes of one device: `run` stops at a SIGTERM to process 1, and is evaluated."""
    commands = [
        train_args(records, base / "run"),
        ["evaluate", "--run_dir", str(base / "run")],
        train_args(records, base / "tensor2", "sharding.MeshConfig.tensor = 2"),
    ]
    processes = run_processes(base / "2x1", commands, 2, 1, {(1, 0): ("SIGTERM", STOP_STEP - 1)})
    shutil.copytree(base / "run", base / "stopped")
    return processes


@pytest.fixture(scope="module")
def two_of_two(base, records):
    """Two processes of two devices, of which process 1 fails in the second run."""
    mesh = "sharding.MeshConfig.fsdp = 2"
    commands = [
        train_args(records, base / "data2_fsdp2", mesh),
        train_args(records, base / "failed", mesh),
    ]
    return run_processes(base / "2x2", commands, 2, 2, {(1, 1): ("raise", STOP_STEP)})


@pytest.fixture(scope="module")
def four(base, records, two):
    """Four processes go on with the run of two, and evaluate its end on the test split alone."""
    test_split = "evaluate.EvalConfig.splits = ('test',)"
    commands = [
        train_args(records, base / "run"),
        ["evaluate", "--run_dir", str(base / "run"), "--gin", test_split],
        train_args(records, base / "fsdp4", "sharding.MeshConfig.fsdp = 4"),
    ]
    return run_processes(base / "4x1", commands, 4, 1)


def final_params(run):
    """The step and the parameters of the newest checkpoint, on this one process."""
    step = finished_steps(run.checkpoints)[-1]
    mesh = make_mesh(MeshConfig())
    return step, jax.device_get(student.load(run.checkpoints / str(step), mesh)[-1])


def check_same_training(found, expected):
    """Sums over rows in another order differ in their last bits, and AdamW divides a gradient by
    its own size: what is near zero, and hence its rounding, moves its parameter by up to the
    learning rate. 2e-5 is a hundredth of one step.
    """
    step, params = final_params(found)
    expected_step, expected_params = final_params(expected)
    assert step == expected_step == NUM_STEPS
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), params, expected_params
    )
    rows, expected_rows = read_json_rows(found.metrics), read_json_rows(expected.metrics)
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    for row, expected_row in zip(rows, expected_rows, strict=True):
        for name in ("loss", "label_loss", "rationale_loss", "grad_norm"):
            assert row[name] == pytest.approx(expected_row[name], rel=1e-5), name
        for name in ("label_tokens", "rationale_tokens", "label_accuracy"):
            assert row[name] == expected_row[name], name


def test_devices_may_lag_behind_an_agreement_to_stop(monkeypatch):
    """As on accelerators: the answer is read two steps later, when the device has long made it."""
    monkeypatch.setattr(distributed, "is_alone", lambda: False)
    anyone = distributed.AnyProcess(make_mesh(MeshConfig()))
    anyone.steps_in_flight = 2
    answers = [anyone.ask(step == 3, results=()) for step in range(1, 8)]
    assert answers == [False, False, False, False, True, False, False]


def test_tensor_parallel_processes_train_as_one_does(base, one, two):
    assert [statuses(process) for process in two] == [[INTERRUPTED, 0, 0]] * 2
    check_same_training(RunDir(base / "tensor2"), one)


def test_processes_of_several_devices_train_as_one_does(base, one, two_of_two):
    assert [statuses(process)[:1] for process in two_of_two] == [[0]] * 2
    check_same_training(RunDir(base / "data2_fsdp2"), one)


def test_parameters_split_over_processes_train_as_one_does(base, one, four):
    assert [statuses(process) for process in four] == [[0, 0, 0]] * 4
    check_same_training(RunDir(base / "fsdp4"), one)


def test_a_signal_to_one_process_stops_all_at_the_same_step(base, two):
    stopped = RunDir(base / "stopped")
    assert stopped.state() == "stopped"
    assert [row["step"] for row in read_json_rows(stopped.metrics)] == [1, 2, STOP_STEP]
    assert finished_steps(stopped.checkpoints) == [STOP_STEP]
    assert f"after step {STOP_STEP}: saved" in two[0].out


def test_a_stopped_run_ends_on_other_processes_as_an_undisturbed_one(base, one, four):
    assert f"Resuming {base / 'run' / 'checkpoints'} after step {STOP_STEP}" in four[0].out
    run = RunDir(base / "run")
    assert run.state() == "finished"
    check_same_training(run, one)


def test_what_is_logged_counts_the_rows_of_all_processes(one, four, base):
    """Of a host's own rows a quarter would be counted."""
    rows, expected = read_json_rows(RunDir(base / "fsdp4").metrics), read_json_rows(one.metrics)
    for row, expected_row in zip(rows, expected, strict=True):
        # One process has eight devices, which pad the rows to 16; four pad them to 8.
        assert row["source_fill"] == pytest.approx(2 * expected_row["source_fill"])
        ratio = row["tokens_per_sec"] / row["examples_per_sec"]
        assert ratio == pytest.approx(
            expected_row["tokens_per_sec"] / expected_row["examples_per_sec"]
        )


@pytest.mark.parametrize(("step", "num_examples"), [(STOP_STEP, 7), (NUM_STEPS, 5)])
def test_evaluation_deals_uneven_inputs_to_processes(
    base, records, four, tmp_path, step, num_examples
):
    """7 inputs over two processes and 5 over four are judged as by one, in order, each once."""
    run = RunDir(base / "run")
    again = RunDir(tmp_path / "again")
    left_out = shutil.ignore_patterns("evaluations*", "best")
    shutil.copytree(run.path, again.path, ignore=left_out)
    if step == STOP_STEP:
        run = RunDir(base / "stopped")
        shutil.copytree(run.checkpoints, again.checkpoints, dirs_exist_ok=True)
    splits = ("validation", "test") if num_examples == 7 else ("test",)
    binding = f"evaluate.EvalConfig.splits = {splits}"
    args = ["--run_dir", str(again.path), "--step", str(step), "--gin", binding]
    assert main(["evaluate", *args]) == 0
    found, expected = (
        list(read_predictions(where.evaluation(step) / "predictions.jsonl"))
        for where in (run, again)
    )
    assert found == expected and len(found) == num_examples
    ids = [e.id for split in splits for e in read_examples(records) if e.split == split]
    assert [prediction.id for prediction in found] == ids


def test_the_best_checkpoint_of_several_processes_serves_one(base, two):
    stopped = RunDir(base / "stopped")
    assert finished_steps(stopped.best) == [STOP_STEP]
    best = student.load(stopped.path, make_mesh(MeshConfig()))[-1]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(best), final_params(stopped)[1])


def test_process_0_alone_speaks(base, two, four):
    for main_process, *others in (two, four):
        assert "test 0.0 % of 5" in main_process.out and "step/s" in main_process.err
        for process in others:
            assert "test 0.0" not in process.out and "step/s" not in process.err
    assert len(list((base / "run").glob("events.out.tfevents*"))) == 2  # one a training


def test_a_fault_in_one_process_ends_all(base, two_of_two):
    first, second = two_of_two
    assert "RuntimeError: a fault of this process" in second.err
    assert "a fault of this process" in first.err.splitlines()[-1]
    assert (first.status, second.status) == (1, 1)


def test_an_error_of_all_processes_is_said_once(base, tmp_path):
    command = train_args(tmp_path / "none.jsonl", tmp_path / "run")
    processes = run_processes(base / "error", [command], 2, 1)
    assert [process.status for process in processes] == [2, 2]
    assert processes[0].err.count("none.jsonl: cannot be read") == 1
    assert "Traceback" not in processes[0].err and "none.jsonl" not in processes[1].err


def test_a_worker_that_does_not_come_is_missed_in_time(records, tmp_path):
    args = ["--coordinator", "127.0.0.1:1", "--num_processes", "2", "--process_id", "1"]
    command = [*train_args(records, tmp_path / "run"), *args, "--start_timeout_secs", "1"]
    (process,) = run_processes(tmp_path / "late", [command], 1, 1)
    assert process.status == 2
    assert "the 2 processes of this run have not met at 127.0.0.1:1 within 1 s" in process.err


def test_processes_that_cannot_be_found_are_one_message(records, tmp_path):
    command = [*train_args(records, tmp_path / "run"), "--distributed"]
    (process,) = run_processes(tmp_path / "none", [command], 1, 1)
    assert "expected a Cloud TPU pod, a Slurm step or Open MPI, or else" in process.err
    assert statuses(process) == [2] and "Traceback" not in process.err
