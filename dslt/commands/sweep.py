"""`dslt sweep`: the paper's comparisons, as ordinary runs side by side."""

import contextlib
import dataclasses
import functools
import itertools
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dslt import signals
from dslt.commands.arguments import add_command, add_gin_flag, positive
from dslt.errors import InputError
from dslt.files import lock_file

POLL_SECS = 0.2
ASSUMED_MFU = 0.35  # what T5 codebases reach on their accelerators: 31 to 42 % by their own figures
BUSY = 75  # an exit status: another process works on this run (EX_TEMPFAIL)


def add(commands) -> None:
    command = add_command(commands, "sweep", sweep, "train and judge many runs to compare")
    command.add_argument("gin_files", nargs="+", help="of SweepConfig; later ones override")
    command.add_argument("--output_dir", required=True, help="a directory a run, and their logs")
    add_gin_flag(command)
    command.add_argument(
        "--jobs", type=positive, default=1, help="runs at a time; the cores are shared out"
    )
    what = command.add_mutually_exclusive_group()
    what.add_argument(
        "--list", action="store_true", help="print a command a run that is missing, and stop"
    )
    what.add_argument(
        "--estimate",
        action="store_true",
        help="print what training the missing runs costs, and stop",
    )
    what.add_argument("--only", metavar="RUN", help="this run alone, in this process")


def sweep(args) -> int:
    """Runs what is missing; the same command goes on after a stop."""
    from dslt import config
    from dslt.records import labelled_splits, read_examples
    from dslt.sweep import expand
    from dslt.workdir import RunDir

    @functools.cache
    def labelled(records: tuple[str, ...]) -> set[str]:
        return labelled_splits(itertools.chain.from_iterable(map(read_examples, records)))

    directory = Path(args.output_dir)
    experiments = expand(config.parse_sweep(args.gin_files, args.gin), config.parse)
    by_name = {experiment.name: experiment for experiment in experiments}
    if args.only:
        if args.only not in by_name:
            raise InputError(
                f"--only {args.only}: is no run of this sweep; --list shows those that are missing"
            )
        return run_one(by_name[args.only], directory)
    missing = [
        name
        for name, experiment in by_name.items()
        if not is_done_as_asked(experiment, RunDir(directory / name), labelled)
    ]
    if args.list:
        for name in missing:
            print(one_line(["dslt", *arguments(args, name)]))
        return 0
    print(f"{len(by_name)} runs, {len(by_name) - len(missing)} of them done", flush=True)
    if args.estimate:
        print(estimate([by_name[name] for name in missing]))
        return 0
    return run_all(args, missing, directory)


def is_done_as_asked(experiment, run, labelled: Callable) -> bool:
    """Whether a run is done and is what the sweep now asks for, or could be by more steps.

    Args:
      labelled: records files to the splits that have gold labels.

    Raises:
      InputError: it is of another config, or of records that have changed since.
    """
    from dslt import config
    from dslt.data.pipeline import records_digests
    from dslt.sweep import COMPUTE, is_done
    from dslt.workdir import read_json

    if not is_done(run, splits=()):  # what is asked for is read of the others alone
        return False
    was = config.parse([str(run.config)])
    now = config.parse(experiment.gin_files, experiment.overrides)
    if experiment.facts["budget"] == COMPUTE:  # `budget_overrides` chose these
        own = {name: getattr(was.train, name) for name in ("num_steps", "save_every_steps")}
        now = dataclasses.replace(now, train=dataclasses.replace(now.train, **own))
    changes = config.find_changes(was, now)
    refused = [str(change) for change in changes if not change.is_allowed]
    if not refused:
        digests = records_digests(now.data.train_files)
        found = read_json(run.info).get("records", {})
        refused = [
            f"{path}: its content has changed since"
            for path, digest in found.items()
            if digests.get(path) != digest
        ]
    if refused:
        raise InputError(
            f"{run.path}: holds a finished run of this name, which is another one:\n  "
            + "\n  ".join(refused)
            + "\nChoose another --output_dir, or move that directory away to do the run anew"
        )
    asked = labelled(now.data.records) & set(now.evaluate.splits)
    return was.train.num_steps == now.train.num_steps and is_done(run, asked)


def arguments(args, name: str) -> list[str]:
    """The arguments of `dslt` that do one run of this sweep."""
    bindings = [part for binding in args.gin for part in ("--gin", binding)]
    return ["sweep", *args.gin_files, "--output_dir", args.output_dir, *bindings, "--only", name]


def one_line(words: list[str]) -> str:
    """A command for a shell, or for xargs.

    Raises:
      InputError: it would be several lines.
    """
    for word in words:
        if "\n" in word:
            raise InputError(f"--list prints a line a run; expected {word!r} on one line")
    return shlex.join(words)


def run_one(experiment, directory: Path) -> int:
    """Trains and judges one run, by the commands that a user would give, which it prints."""
    from dslt.main import main
    from dslt.sweep import EXPERIMENT
    from dslt.workdir import RunDir, write_json

    path = directory / experiment.name
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".sweep.lock").open("w") as lock:
        if not lock_file(lock):
            print(f"{path}: another process works on this run", file=sys.stderr)
            return BUSY
        write_json(path / EXPERIMENT, experiment.facts)
        bindings = [*experiment.overrides, *budget_overrides(experiment, RunDir(path))]
        gin = [part for binding in bindings for part in ("--gin", binding)]
        train = ["train", *experiment.gin_files, *gin, "--run_dir", str(path)]
        for command in (train, ["evaluate", "--run_dir", str(path)]):
            print(f"$ {shlex.join(['dslt', *command])}", flush=True)
            if status := main(command):
                return status
    return 0


def estimate(experiments) -> str:
    """What training these runs costs: model FLOPs, and hours on one chip of each known kind."""
    from dslt import config
    from dslt.core.flops import PEAK_FLOPS
    from dslt.data.pipeline import make_vocabulary
    from dslt.sweep import COMPUTE

    flops, vocabularies, flops_of = 0.0, {}, {}  # by what a config prints: a mapping has no hash
    with tempfile.TemporaryDirectory() as directory:
        for experiment in experiments:
            configs = config.parse(experiment.gin_files, experiment.overrides)
            has_both_tasks = (
                experiment.facts["budget"] == COMPUTE or configs.train.rationale_weight > 0
            )
            data = dataclasses.replace(configs.data, train_fraction=1.0)
            key = repr(data)
            if key not in vocabularies:
                own = tempfile.mkdtemp(dir=directory)  # SeqIO remembers a vocabulary by its path
                vocabularies[key] = make_vocabulary(data, Path(own) / "vocabulary")
            step = (repr(configs.model), key, has_both_tasks)
            if step not in flops_of:
                flops_of[step] = step_flops(
                    configs.model, data, vocabularies[key], 0, has_both_tasks
                )
            flops += configs.train.num_steps * flops_of[step]
    lines = [
        f"{len(experiments):,} missing runs: {flops / 1e15:,.4g} PFLOPs of training, at the train "
        "split's mean lengths",
        f"hours on one chip at {ASSUMED_MFU:.0%} of its peak (assumed; `dslt bench` measures it), "
        "without start, compilation and evaluation:",
    ]
    lines += [
        f"  {chip:12} {flops / (ASSUMED_MFU * peak) / 3600:9,.2f}"
        for chip, peak in PEAK_FLOPS.items()
    ]
    return "\n".join(lines)


def budget_overrides(experiment, run) -> list[str]:
    """The number of steps of a run that is given the compute of both tasks; else nothing."""
    from dslt import config
    from dslt.commands.train import open_vocabulary
    from dslt.sweep import COMPUTE, equal_compute_steps

    if experiment.facts["budget"] != COMPUTE:
        return []
    configs = config.parse(experiment.gin_files, experiment.overrides)
    vocabulary = open_vocabulary(run, configs)
    own_flops, both_flops = (
        step_flops(configs.model, configs.data, vocabulary, configs.train.seed, has_both_tasks)
        for has_both_tasks in (False, True)
    )
    steps = equal_compute_steps(configs.train.num_steps, own_flops, both_flops)
    every = round(configs.train.save_every_steps * steps / configs.train.num_steps)
    return [
        f"train.TrainConfig.num_steps = {steps}",
        f"train.TrainConfig.save_every_steps = {max(1, every)}",
    ]


def step_flops(model, data, vocabulary, seed: int, has_both_tasks: bool) -> float:
    """Model FLOPs of a step, of a method's own one task or of both, at the mean lengths of the
    examples of its train split's subset."""
    from dslt.core.flops import train_step_flops
    from dslt.data.pipeline import TrainStream
    from dslt.data.target_layout import LABEL

    if has_both_tasks:
        data = dataclasses.replace(data, target_layout=LABEL)
    stream = TrainStream(data, vocabulary, seed=seed, use_rationales=has_both_tasks)
    return data.batch_examples * train_step_flops(model, *stream.mean_example_tokens())


def run_all(args, names: list[str], directory: Path) -> int:
    """Runs these in processes of their own, some at a time; returns the exit status."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR")
        or str((directory / ".compile_cache").absolute())
    }
    waiting, under_way, failed, busy = list(names), {}, [], []
    free_cores = share_cores(args.jobs)
    started_secs = time.perf_counter()
    with signals.deferred() as stop, stopping(under_way):
        while (waiting or under_way) and not stop.is_requested:
            while waiting and len(under_way) < args.jobs:
                name = waiting.pop(0)
                try:
                    process = start_run(args, name, directory, environment, free_cores[-1])
                except OSError as error:
                    failed.append(name)
                    print(f"{name}: cannot be started ({error})", file=sys.stderr)
                    continue
                under_way[name] = process, free_cores.pop(), time.perf_counter()
            time.sleep(POLL_SECS)
            for name, (process, cores, began_secs) in list(under_way.items()):
                status = process.poll()
                if status is None:
                    continue
                del under_way[name]
                free_cores.append(cores)
                failed += [name] if status not in (0, BUSY) else []
                busy += [name] if status == BUSY else []
                done = len(names) - len(waiting) - len(under_way)
                secs = time.perf_counter() - began_secs
                print(f"[{done}/{len(names)}] {secs:,.0f} s  {describe(directory / name, status)}")
                sys.stdout.flush()
    if waiting or under_way:
        print("Stopped: what was under way is saved. The same command goes on.")
        return signals.INTERRUPTED
    print(f"{len(names)} runs in {(time.perf_counter() - started_secs) / 60:,.1f} minutes")
    if busy:
        print(f"{len(busy)} of them are worked on by another process: {', '.join(busy)}")
    if failed:
        print(
            f"{len(failed)} failed: {', '.join(failed)}; the same command tries them again",
            file=sys.stderr,
        )
    return 1 if failed else 0


@contextlib.contextmanager
def stopping(under_way: dict[str, tuple]) -> Iterator[None]:
    """However the block ends, stops the runs that are still under way, and waits until they are
    saved; a run's first entry is its process."""
    try:
        yield
    finally:
        for process, *_ in under_way.values():
            process.send_signal(signal.SIGTERM)
        for process, *_ in under_way.values():
            process.wait()


def share_cores(jobs: int) -> list[tuple[int, ...]]:
    """The cores of each job, so that small runs do not wait for one another; () is any."""
    if not hasattr(os, "sched_setaffinity") or jobs == 1:
        return [()] * jobs
    cores = sorted(os.sched_getaffinity(0))
    return [tuple(cores[job::jobs]) or tuple(cores) for job in range(jobs)]


def start_run(
    args, name: str, directory: Path, environment: dict, cores: tuple[int, ...]
) -> subprocess.Popen:
    """A process that does one run and appends what it prints to `RUN/log.txt`."""
    path = directory / name
    path.mkdir(parents=True, exist_ok=True)
    with (path / "log.txt").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dslt.main", *arguments(args, name)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a Ctrl-C is handed on once, not twice
        )
    if cores:
        with contextlib.suppress(OSError):  # it runs on any core
            os.sched_setaffinity(process.pid, cores)
    return process


def describe(path: Path, status: int) -> str:
    """What became of a run, in one line, or with the end of its log."""
    from dslt.evaluate import describe as describe_row
    from dslt.workdir import RunDir, best_row, read_json_rows

    if status == BUSY:
        return f"{path.name}: another process works on it"
    if status:
        failed, log = f"{path.name}: failed with status {status}", path / "log.txt"
        try:
            last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
        except OSError as error:  # somebody took it away
            return f"{failed}; {log} cannot be read ({error.strerror}): there is no log to show"
        return f"{failed}; the end of {log}:" + "".join(f"\n    {line}" for line in last)
    row = best_row(read_json_rows(RunDir(path).evaluations))
    return f"{path.name}: " + (describe_row(row) if row else "no validation split to choose by")
