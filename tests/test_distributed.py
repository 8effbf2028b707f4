"""Two and four real processes on this machine do what one does: train, stop, resume, evaluate.

Each group of processes runs several commands one after another, because starting it is what takes
time. A group that hangs is killed, and its test fails.
"""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dslt import config, distributed
from dslt.checkpoint import student
from dslt.checkpoint.integrity import checksum
from dslt.checkpoint.manager import finished_steps
from dslt.commands.processes import start_processes
from dslt.commands.train import open_train_stream
from dslt.core.sharding import MeshConfig, make_mesh
from dslt.errors import InputError
from dslt.main import build_parser, main
from dslt.records import read_examples, read_predictions
from dslt.signals import INTERRUPTED
from dslt.workdir import RunDir, read_json_rows

HANG_SECS = 300  # a group takes a tenth of it where two cores are free
NUM_STEPS = 6
STOP_STEP = 3
SMALL = (
    "t5.T5Config.d_model = 16",
    "t5.T5Config.d_kv = 4",
    "t5.T5Config.d_ff = 32",
    "t5.T5Config.num_heads = 4",
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
    "evaluate.EvalConfig.max_rationale_length = 8",
)
FSDP = "sharding.MeshConfig.fsdp = 2"
TENSOR = "sharding.MeshConfig.tensor = 4"
# How the test evaluates after a step: so that an answer depends on its input and on its number.
HOW = {
    STOP_STEP: (
        "evaluate.EvalConfig.splits = ('validation', 'test')",
        "evaluate.EvalConfig.strategy = 'sample'",
        "evaluate.EvalConfig.with_rationales = True",
    ),
    NUM_STEPS: (
        "evaluate.EvalConfig.splits = ('validation',)",
        "evaluate.EvalConfig.answers = 'likelihood'",
        "evaluate.EvalConfig.labels = ('neutral', 'entailment', 'contradiction')",
    ),
}
# argv: a file of command lines, each perhaps with a signal that this process gets, and the step
# after which it comes (0: a fault of the program instead, before the first step); where the first
# batch of each training goes.
WORKER = """
import json, os, signal, sys, time
sys.modules["torch"] = None  # tensorboardX would import it: two seconds
import numpy as np
from dslt import distributed
from dslt.data.pipeline import TrainStream
from dslt.main import main

ask, batches = distributed.AnyProcess.ask, TrainStream.batches
distributed.GRACE_SECS = 2.0

def disturb(event, after_step):
    def disturbed(self, *args):
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == after_step:
            os.kill(os.getpid(), getattr(signal, event))
            is_stopping = ask(self, False, *args[1:])
            self.tell()  # as the next step would, but so early that it is the one to stop after
            time.sleep(1.0)
            return is_stopping
        return ask(self, *args)

    def faulty(*_, **__):
        raise RuntimeError("a fault of this process")

    if after_step:
        distributed.AnyProcess.ask = disturbed
    else:
        TrainStream.__init__ = faulty

def recorded(self, step, rows):
    found = batches(self, step, rows)
    first = next(found)
    np.savez(f"{sys.argv[2]}.{number}.npz", step=step, rows=rows, **first._asdict())
    yield first
    yield from found

TrainStream.batches = recorded
for number, (arguments, *event) in enumerate(json.load(open(sys.argv[1]))):
    distributed.AnyProcess.ask = ask
    if event:
        disturb(*event)
    print("exit status", main(arguments), file=sys.stderr, flush=True)
"""


def run_processes(directory, commands, processes, devices, disturbed=(), by_flags=False):
    """Runs commands in `processes` processes of `devices` CPU devices each.

    They meet by the environment, or by flags. `disturbed` maps (process, number of the command) to
    a signal and the step after which it comes. Returns what each process exited with, wrote to
    standard output and to standard error, and the first batch of each command that trained.
    """
    directory.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}"),
    }
    running = []
    for process in range(processes):
        script = directory / f"{process}.json"
        flags = []
        if by_flags:
            flags = ["--coordinator", address, "--num_processes", str(processes)]
            flags += ["--process_id", str(process)]
        elif processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(process),
            }
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
                    [sys.executable, "-c", WORKER, str(script), str(directory / str(process))],
                    env=environment,
                    stdout=out,
                    stderr=err,
                )
            )
    deadline = time.monotonic() + HANG_SECS
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
            batches={
                int(path.suffixes[-2][1:]): np.load(path)
                for path in directory.glob(f"{number}.*.npz")
            },
        )
        for number, process in enumerate(running)
    ]


def statuses(process):
    """What each command of one process returned."""
    lines = process.err.splitlines()
    return [int(line.split()[-1]) for line in lines if line.startswith("exit status")]


def gin_args(bindings):
    return [part for binding in bindings for part in ("--gin", binding)]


def train_args(records, run_dir, *overrides):
    bindings = (f"pipeline.DataConfig.records = ({str(records)!r},)", *SMALL, *overrides)
    files = ["runs/step_by_step.gin", "settings/facts.gin"]
    return ["train", *files, "--run_dir", str(run_dir), *gin_args(bindings)]


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
def two(base, records, one):
    """Two processes of one device: `run` stops at a SIGTERM to process 1, and is evaluated; in the
    last run process 1 is killed.
    """
    commands = [
        train_args(records, base / "run", FSDP),
        ["evaluate", "--run_dir", str(base / "run"), *gin_args(HOW[STOP_STEP])],
        train_args(records, base / "killed", FSDP),
    ]
    events = {(1, 0): ("SIGTERM", STOP_STEP - 1), (1, 2): ("SIGKILL", STOP_STEP)}
    processes = run_processes(base / "2x1", commands, 2, 1, events)
    shutil.copytree(base / "run", base / "stopped")
    return processes


@pytest.fixture(scope="module")
def two_of_two(base, records, one):
    """Two processes of two devices, of which process 1 fails before the second run."""
    commands = [
        train_args(records, base / "tensor4", TENSOR),
        train_args(records, base / "failed", TENSOR),
    ]
    return run_processes(base / "2x2", commands, 2, 2, {(1, 1): ("", 0)}, by_flags=True)


@pytest.fixture(scope="module")
def four(base, records, two):
    """Four processes go on with the run of two, whose newest checkpoint is damaged by then, and
    evaluate its end. One array is another: the process that reads it must tell the others.
    """
    checkpoints = RunDir(base / "run").checkpoints
    damaged = checkpoints / str(STOP_STEP + 1)
    shutil.copytree(checkpoints / str(STOP_STEP), damaged)
    content = json.loads((damaged / "layout" / "metadata").read_text())
    content["step"] += 1
    content["digests"]["params"]["encoder/final_norm/scale"] = "00000000"
    content["checksum"] = checksum(content)
    (damaged / "layout" / "metadata").write_text(json.dumps(content))
    commands = [
        train_args(records, base / "run", FSDP),
        ["evaluate", "--run_dir", str(base / "run"), *gin_args(HOW[NUM_STEPS])],
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


def test_tensor_parallel_processes_train_as_one_does(base, one, two_of_two):
    assert [statuses(process) for process in two_of_two] == [[0]] * 2
    check_same_training(RunDir(base / "tensor4"), one)


@pytest.mark.parametrize(
    ("group", "number", "step", "num_rows"),
    [
        ("two", 0, 0, [4, 4]),
        ("two_of_two", 0, 0, [8, 8]),  # both hold all rows where tensor crosses them
        ("four", 0, STOP_STEP, [2, 2, 2, 2]),
    ],
)
def test_the_rows_of_the_processes_are_those_of_one(
    request, records, one, group, number, step, num_rows
):
    """Each builds its own alone, and together they have every row as one process builds it."""
    configs = config.parse([str(one.config)], [])
    whole = open_train_stream(one, configs)[0].batch(step, np.arange(8))
    found = [process.batches[number] for process in request.getfixturevalue(group)]
    assert [len(part["rows"]) for part in found] == num_rows
    assert set(np.concatenate([part["rows"] for part in found])) == set(range(8))
    for part in found:
        assert part["step"] == step
        for name, array in whole._asdict().items():
            np.testing.assert_array_equal(part[name], array[part["rows"]])


def test_a_signal_to_one_process_stops_all_at_the_same_step(base, two):
    assert [statuses(process) for process in two] == [[INTERRUPTED, 0]] * 2
    stopped = RunDir(base / "stopped")
    assert stopped.state() == "stopped"
    assert [row["step"] for row in read_json_rows(stopped.metrics)] == [1, 2, STOP_STEP]
    assert finished_steps(stopped.checkpoints) == [STOP_STEP]
    assert f"after step {STOP_STEP}: saved" in two[0].out


def test_a_stopped_run_ends_on_other_processes_as_an_undisturbed_one(base, one, four):
    """Over two processes fsdp splits rows and parameters; over four data splits the rows too."""
    assert [statuses(process) for process in four] == [[0, 0]] * 4
    assert f"Resuming {base / 'run' / 'checkpoints'} after step {STOP_STEP}" in four[0].out
    assert (base / "run" / "damaged" / f"checkpoints-{STOP_STEP + 1}").is_dir()
    run = RunDir(base / "run")
    assert run.state() == "finished"
    check_same_training(run, one)


def test_what_is_logged_counts_the_rows_of_all_processes(one, four, base):
    """Of a host's own rows a quarter would be counted."""
    rows, expected = read_json_rows(RunDir(base / "run").metrics), read_json_rows(one.metrics)
    for row, expected_row in zip(rows, expected, strict=True):
        # One process has eight devices, which pad the rows to 16; two and four pad them to 8.
        assert row["source_fill"] == pytest.approx(2 * expected_row["source_fill"])
        ratio = row["tokens_per_sec"] / row["examples_per_sec"]
        assert ratio == pytest.approx(
            expected_row["tokens_per_sec"] / expected_row["examples_per_sec"]
        )


@pytest.mark.parametrize(
    ("step", "splits", "num_examples"),
    [(STOP_STEP, ("validation", "test"), 7), (NUM_STEPS, ("validation",), 2)],
)
def test_evaluation_deals_uneven_inputs_to_processes(
    base, records, four, tmp_path, step, splits, num_examples
):
    """7 inputs over two processes are judged as by one, in order, each once; so are 2 over four, of
    which two have nothing to do.
    """
    run = RunDir(base / ("stopped" if step == STOP_STEP else "run"))
    again = RunDir(tmp_path / "again")
    shutil.copytree(run.path, again.path, ignore=shutil.ignore_patterns("evaluations*", "best"))
    bindings = (*HOW[step], "sharding.MeshConfig.fsdp = 8")
    args = ["--run_dir", str(again.path), "--step", str(step), *gin_args(bindings)]
    assert main(["evaluate", *args]) == 0
    found, expected = (
        list(read_predictions(where.evaluation(step) / "predictions.jsonl"))
        for where in (run, again)
    )
    ids = [e.id for split in splits for e in read_examples(records) if e.split == split]
    assert [prediction.id for prediction in found] == ids and len(ids) == num_examples
    for one_of_several, one_of_one in zip(found, expected, strict=True):
        if one_of_one.probability is not None:
            assert one_of_several.probability == pytest.approx(one_of_one.probability, rel=1e-5)
            one_of_one = dataclasses.replace(one_of_one, probability=one_of_several.probability)
        assert one_of_several == one_of_one
    if step == STOP_STEP:
        assert len({prediction.prediction for prediction in found}) > 1  # else any order would do
    else:
        assert len({prediction.probability for prediction in found}) == num_examples


def test_the_best_checkpoint_of_several_processes_serves_one(base, two):
    stopped = RunDir(base / "stopped")
    assert finished_steps(stopped.best) == [STOP_STEP]
    best = student.load(stopped.path, make_mesh(MeshConfig()))[-1]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(best), final_params(stopped)[1])


def test_a_bar_is_drawn_by_process_0_where_somebody_looks_and_wants_to(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert not distributed.hides_bars()
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert distributed.hides_bars()
    for value in ("0", ""):
        monkeypatch.setenv("TQDM_DISABLE", value)
        assert not distributed.hides_bars()
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    assert distributed.hides_bars()
    monkeypatch.setattr(distributed, "is_main", lambda: True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    assert distributed.hides_bars()


def test_process_0_alone_speaks(base, two, four):
    for main_process, *others in (two, four):
        assert "best on validation" in main_process.out and "label_loss=" in main_process.err
        for process in others:
            assert "validation" not in process.out and "label_loss=" not in process.err
    assert len(list((base / "run").glob("events.out.tfevents*"))) == 2  # one a training


def test_a_fault_in_one_process_ends_all(two_of_two):
    first, second = two_of_two
    assert "RuntimeError: a fault of this process" in second.err
    assert "a fault of this process" in first.err.splitlines()[-1]
    assert (first.status, second.status) == (1, 1)


def test_the_others_of_a_killed_process_end_with_a_message(two):
    survivor, killed = two
    assert (survivor.status, killed.status) == (1, -signal.SIGKILL)
    assert "(where another process has died" in survivor.err.splitlines()[-1]


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


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        ("--coordinator 10.0.0.1", {}, "is '10.0.0.1'; expected host:port"),
        ("--coordinator here:80000", {}, "is 'here:80000'; expected host:port"),
        ("", {"JAX_COORDINATOR_ADDRESS": "here"}, "is 'here'; expected host:port"),
        ("--distributed", {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'; expected a"),
        ("--distributed", {"JAX_PROCESS_ID": "first"}, "JAX_PROCESS_ID is 'first'; expected a"),
    ],
)
def test_settings_that_cannot_be_are_refused(monkeypatch, capsys, flags, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main([*train_args("none", "none"), *flags.split()]) == 2
    assert message in capsys.readouterr().err


def test_processes_that_cannot_be_found_are_one_message(tmp_path):
    address = ["--coordinator", "127.0.0.1:1"]
    cases = {
        "coordinator_address should be defined": ["--distributed"],
        "Number of processes must be defined": address,
        "id of the current process must be defined": [*address, "--num_processes", "2"],
        "process_id=2, num_processes=2": [*address, *["--num_processes", "2", "--process_id", "2"]],
    }
    commands = [[*train_args("none", "none"), *flags] for flags in cases.values()]
    (process,) = run_processes(tmp_path / "none", commands, 1, 1)
    assert statuses(process) == [2] * len(cases) and "Traceback" not in process.err
    messages = [line for line in process.err.splitlines() if line.startswith("dslt train: ")]
    for message, part in zip(messages, cases, strict=True):
        assert part in message and "expected a Cloud TPU pod, a Slurm step or" in message


def test_without_flags_or_environment_one_process_connects_nowhere(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("connects")

    monkeypatch.setattr(distributed, "initialize", fail)
    parser = build_parser()
    for command in (train_args("none", "none"), ["evaluate", "--run_dir", "none"]):
        start_processes(parser.parse_args(command))
        with pytest.raises(AssertionError, match="connects"):
            start_processes(parser.parse_args([*command, "--distributed"]))
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1234")
    with pytest.raises(AssertionError, match="connects"):
        start_processes(parser.parse_args(command))


def test_processes_that_were_not_told_of_each_other_are_refused(monkeypatch):
    distributed.check_joined()
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(InputError, match="one of 4 processes whose devices JAX sees"):
        distributed.check_joined()
