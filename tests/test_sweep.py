"""A sweep's runs: which there are, what they are called, and that they are done once."""

import argparse
import dataclasses
import itertools
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dslt import config
from dslt.commands import sweep as command
from dslt.core.flops import train_step_flops
from dslt.data.pipeline import TrainStream, make_vocabulary
from dslt.errors import InputError
from dslt.main import main
from dslt.sweep import SET_BY, SweepConfig, equal_compute_steps, expand, is_done
from dslt.workdir import RunDir, read_json, read_json_rows, write_json_rows

ONE_METHOD = {"settings": ("settings/facts.gin",), "methods": ("runs/step_by_step.gin",)}
SMALL = (
    "t5.T5Config.d_model = 16",
    "t5.T5Config.d_ff = 32",
    "pipeline.DataConfig.batch_examples = 8",
    "train.TrainConfig.num_steps = 4",
    "train.TrainConfig.save_every_steps = 2",
    "train.TrainConfig.log_every_steps = 2",
    "evaluate.EvalConfig.max_label_length = 8",
)


def explained(directory: Path, train: int) -> tuple[str, ...]:
    """A records file each of two families."""
    paths = []
    for family in ("facts", "sums"):
        output = directory / family
        sizes = ["--train", str(train), "--validation", "6", "--test", "6"]
        args = ["--dataset", family, "--teacher", "scripted", *sizes]
        assert main(["extract", *args, "--output_dir", str(output)]) == 0
        paths.append(str(output / "records.jsonl"))
    return tuple(paths)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return explained(tmp_path_factory.mktemp("records"), train=40)


def names_of(**fields):
    return [run.name for run in expand(SweepConfig(**fields), config.parse)]


def test_a_sweep_is_the_product_of_its_axes_with_the_first_seed_first(records):
    methods = ("runs/fine_tuning.gin", "runs/step_by_step.gin")
    names = names_of(
        records=records,
        settings=("settings/facts.gin",),
        methods=methods,
        fractions=(0.125, 1.0),
        seeds=(0, 7),
    )
    assert names == [
        f"{dataset}-{method}-{percent}pct-seed{seed}"
        for seed, percent, dataset, method in itertools.product(
            (0, 7), ("12.5", "100"), ("facts", "sums"), ("fine_tuning", "step_by_step")
        )
    ]


def test_what_a_run_is_called_does_not_depend_on_the_others(records):
    small = names_of(records=records[:1], **ONE_METHOD, seeds=(1,))
    larger = names_of(
        records=records,
        settings=ONE_METHOD["settings"],
        fractions=(0.5, 1.0),
        rationale_weights=(0.5, 1.0),
        budgets=("steps", "compute"),
    )
    assert set(small) <= set(larger)
    assert len(set(larger)) == len(larger)


def test_a_run_is_given_what_its_name_says(records):
    (run,) = expand(
        SweepConfig(
            records=records[:1],
            **ONE_METHOD,
            fractions=(0.25,),
            models=("models/mini_256.gin",),
            rationale_weights=(0.3,),
            seeds=(5,),
            overrides=("train.TrainConfig.num_steps = 11",),
        ),
        config.parse,
    )
    assert run.name == "facts-step_by_step-mini_256-lambda0.3-25pct-seed5"
    assert {binding.split(" = ")[0] for binding in run.overrides[1:]} == set(SET_BY)
    found = config.parse(run.gin_files, run.overrides)
    assert (found.train.seed, found.train.rationale_weight, found.train.num_steps) == (5, 0.3, 11)
    assert (found.data.train_fraction, found.data.records) == (0.25, records[:1])
    assert found.model.d_model == 256
    assert run.facts == {
        "method": "step_by_step",
        "dataset": "facts",
        "variant": "",
        "fraction": 0.25,
        "model": "mini_256",
        "seed": 5,
        "rationale_weight": 0.3,
        "label_source": "gold",
        "budget": "steps",
        "is_augmented": False,
    }


def test_an_axis_is_for_the_methods_that_it_says_something_to(records):
    """λ and compute: with, and without a rationale task; augmentation: the teacher's labels."""
    names = names_of(
        records=records[:1],
        settings=("settings/facts.gin",),
        rationale_weights=(0.5, 2.0),
        budgets=("steps", "compute"),
        augmentation=records[1:],
        seeds=(0,),
    )
    runs = sorted(name.removeprefix("facts-").removesuffix("-100pct-seed0") for name in names)
    assert runs == sorted(
        [
            "fine_tuning",
            "fine_tuning-compute",
            "distillation",
            "distillation-compute",
            "distillation-augmented",
            "distillation-augmented-compute",
            "step_by_step-lambda0.5",
            "step_by_step-lambda2",
            "step_by_step_teacher-lambda0.5",
            "step_by_step_teacher-lambda2",
            "step_by_step_teacher-lambda0.5-augmented",
            "step_by_step_teacher-lambda2-augmented",
        ]
    )


def test_records_explained_otherwise_are_for_the_methods_that_learn_of_the_teacher(
    records, tmp_path
):
    again = tmp_path / "two_teachers.jsonl"
    again.write_bytes(Path(records[0]).read_bytes())
    methods = ("fine_tuning", "distillation", "step_by_step", "rationale_label")
    runs = expand(
        SweepConfig(
            records=(records[0], str(again), records[1]),
            variants=("", "two_teachers", ""),
            settings=("settings/facts.gin",),
            methods=tuple(f"runs/{method}.gin" for method in methods),
            seeds=(0,),
        ),
        config.parse,
    )
    read = {run.name: config.parse(run.gin_files, run.overrides).data.records for run in runs}
    assert read == {
        **{f"facts-{method}-100pct-seed0": records[:1] for method in methods},
        **{f"facts-{method}-two_teachers-100pct-seed0": (str(again),) for method in methods[1:]},
        **{f"sums-{method}-100pct-seed0": records[1:] for method in methods},
    }
    assert [run.facts["variant"] for run in runs if "two_teachers" in run.name] == (
        ["two_teachers"] * 3
    )


def test_an_augmented_run_learns_of_the_other_problems_too(records):
    runs = expand(
        SweepConfig(
            records=records[:1],
            settings=("settings/facts.gin",),
            methods=("runs/distillation.gin",),
            augmentation=records[1:],
            seeds=(0,),
        ),
        config.parse,
    )
    read = [config.parse(run.gin_files, run.overrides).data for run in runs]
    assert [data.records for data in read] == [records[:1]] * 2
    assert [data.augmentation for data in read] == [(), records[1:]]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"fractions": (0.5, 0.5)}, "two runs named facts-step_by_step-50pct-seed0"),
        ({"variants": ("a",)}, "variants has 1 names and records has 2"),
        ({"variants": ("../a", "")}, "variants has '../a'; expected what a directory"),
        ({"fractions": (0.0,)}, "fractions has 0.0"),
        ({"fractions": ()}, "fractions is empty"),
        ({"records": ()}, "records is empty"),
        ({"budgets": ("time",)}, "budgets has 'time'; expected some of steps, compute"),
        ({"settings": ("a", "b", "c")}, "settings has 3 files and records has 2"),
        ({"settings": ("settings/nothing.gin",)}, "no shipped gin file"),
        ({"overrides": ("train.TrainConfig.seed = 5",)}, r"expected SweepConfig.seeds to say it"),
        (
            {"overrides": (SMALL[0], "pipeline.DataConfig.train_fraction=0.1")},
            r"binds pipeline.DataConfig.train_fraction, .* expected SweepConfig.fractions",
        ),
    ],
)
def test_a_sweep_that_cannot_be_is_one_message(fields, says, records):
    with pytest.raises(InputError, match=says):
        names_of(**({"records": records} | ONE_METHOD | fields))


def test_records_of_one_dataset_need_names_to_tell_them_apart(records):
    with pytest.raises(InputError, match=r"both hold 'facts'; expected .* SweepConfig.variants"):
        names_of(records=(records[0], records[0]), **ONE_METHOD)


def test_a_binding_of_a_run_in_a_sweep_file_is_not_silently_without_effect(tmp_path):
    path = tmp_path / "sweep.gin"
    path.write_text(
        "from __gin__ import dynamic_registration\nfrom dslt import train\n"
        "train.TrainConfig.num_steps = 5\n"
    )
    with pytest.raises(InputError, match=r"expected one of: .*from dslt import sweep"):
        config.parse_sweep([str(path)])


def test_compute_is_equal_up_to_a_step():
    assert equal_compute_steps(1000, own_flops=2.0, two_task_flops=5.0) == 2500
    assert equal_compute_steps(1, own_flops=9.0, two_task_flops=1.0) == 1


@pytest.fixture(scope="module")
def swept(records, tmp_path_factory):
    """A sweep's arguments after one of its three runs was done alone."""
    directory = tmp_path_factory.mktemp("sweep")
    broken = directory / "broken.gin"  # one target, and the rationale task as well
    broken.write_text(
        "from __gin__ import dynamic_registration\nfrom dslt.data import pipeline\n"
        "include 'runs/step_by_step.gin'\n"
        "pipeline.DataConfig.target_layout = 'rationale_label'\n"
    )
    file = directory / "sweep.gin"
    bindings = {
        "records": records[:1],
        "settings": ("settings/facts.gin",),
        "methods": ("runs/rationale_label.gin", "runs/fine_tuning.gin", str(broken)),
        "fractions": (0.5,),
        "seeds": (0,),
        "overrides": SMALL,
    }
    lines = [f"sweep.SweepConfig.{name} = {value!r}" for name, value in bindings.items()]
    header = ["from __gin__ import dynamic_registration", "from dslt import sweep"]
    file.write_text("\n".join([*header, *lines]) + "\n")
    args = ["sweep", str(file), "--output_dir", str(directory / "runs")]
    only = "facts-rationale_label-50pct-seed0"
    assert main([*args, "--only", only]) == 0
    return args, directory / "runs", only


def test_a_run_of_a_sweep_is_an_ordinary_run_that_says_what_it_is(swept):
    _, directory, only = swept
    run = RunDir(directory / only)
    assert is_done(run, ("validation", "test"))
    facts = read_json(run.path / "experiment.json")
    assert (facts["method"], facts["fraction"]) == ("rationale_label", 0.5)
    assert [row["step"] for row in read_json_rows(run.evaluations)] == [2, 4]
    assert "DataConfig.target_layout = 'rationale_label'" in run.config.read_text()


def test_a_list_has_a_command_for_what_is_missing(swept, capsys):
    args, _, only = swept
    assert main([*args, "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("dslt sweep ") and " --only facts-" in line for line in lines)
    assert only not in "".join(lines)
    assert main([*args, "--list", "--gin", "sweep.SweepConfig.seeds = (\n0,)"]) == 2
    assert "on one line" in capsys.readouterr().err


def test_a_finished_run_of_another_config_or_of_other_records_is_not_taken_for_done(swept, capsys):
    args, directory, only = swept
    done = [*args, "--list", "--gin", "sweep.SweepConfig.methods = ('runs/rationale_label.gin',)"]
    info = directory / only / "run.json"
    kept = info.read_text()
    other = (*SMALL, "optimizer.OptimizerConfig.learning_rate = 0.5")
    assert main([*done, "--gin", f"sweep.SweepConfig.overrides = {other!r}"]) == 2
    error = capsys.readouterr().err
    assert f"{directory / only}: holds a finished run" in error
    assert "OptimizerConfig.learning_rate: was" in error and "now 0.5" in error
    digest = next(iter(read_json(info)["records"].values()))
    info.write_text(kept.replace(digest, "0" * 64))
    assert main(done) == 2
    assert "records.jsonl: its content has changed since" in capsys.readouterr().err
    info.write_text(kept)
    assert main(done) == 0
    assert capsys.readouterr().out == ""


def test_a_run_is_done_once_it_was_judged_on_each_split_that_is_asked_for(swept, capsys):
    args, directory, only = swept
    listed = [*args, "--list", "--gin", "sweep.SweepConfig.methods = ('runs/rationale_label.gin',)"]
    evaluations = RunDir(directory / only).evaluations

    def is_listed(*splits: str) -> bool:
        overrides = (*SMALL, f"evaluate.EvalConfig.splits = {splits}")
        assert main([*listed, "--gin", f"sweep.SweepConfig.overrides = {overrides!r}"]) == 0
        return f"--only {only}" in capsys.readouterr().out

    assert is_listed("validation", "test", "train")
    assert not is_listed("validation", "test")
    of_test = [
        {name: x for name, x in row.items() if not name.startswith("validation/")}
        for row in read_json_rows(evaluations)
    ]
    write_json_rows(evaluations, of_test)
    assert is_listed("validation", "test")
    assert not is_listed("test")
    assert main([*args, "--only", only]) == 0
    assert not is_listed("validation", "test")


@pytest.mark.parametrize("flag", ["--list", "--estimate"])
def test_what_only_prints_starts_no_run(swept, capsys, flag):
    args, directory, _ = swept
    missing = "facts-fine_tuning-50pct-seed0"
    with pytest.raises(SystemExit, match="2"):
        main([*args, flag, "--only", missing])
    assert f"--only: not allowed with argument {flag}" in capsys.readouterr().err
    assert not (directory / missing).exists()


def test_a_list_of_nothing_is_empty(swept, capsys):
    args, _, _ = swept
    done = "sweep.SweepConfig.methods = ('runs/rationale_label.gin',)"
    assert main([*args, "--list", "--gin", done]) == 0
    assert capsys.readouterr().out == ""


def test_an_estimate_is_the_flops_of_what_is_missing(tmp_path, capsys):
    """In PFLOPs, and in hours at 35 % of a chip's peak; nothing is run. Several vocabularies: each
    records file has its own, and so has a target of two parts."""
    records = explained(tmp_path, train=32)
    methods = {"fine_tuning": False, "step_by_step": True, "rationale_label": False}
    steps = 1_000_000_000
    overrides = (*SMALL[2:], f"train.TrainConfig.num_steps = {steps}")
    file = tmp_path / "sweep.gin"
    file.write_text(
        "from __gin__ import dynamic_registration\nfrom dslt import sweep\n"
        f"sweep.SweepConfig.records = {records!r}\n"
        "sweep.SweepConfig.settings = ('settings/facts.gin',)\n"
        f"sweep.SweepConfig.methods = {tuple(f'runs/{method}.gin' for method in methods)!r}\n"
        "sweep.SweepConfig.seeds = (0, 1)\n"
        f"sweep.SweepConfig.overrides = {overrides!r}\n"
    )
    runs = tmp_path / "runs"
    assert main(["sweep", str(file), "--output_dir", str(runs), "--estimate"]) == 0
    printed = capsys.readouterr().out
    step_flops = 0.0
    for path, (method, use_rationales) in itertools.product(records, methods.items()):
        files = (f"runs/{method}.gin", "settings/facts.gin")
        configs = config.parse(files, [f"pipeline.DataConfig.records = ({path!r},)", *SMALL[2:]])
        vocabulary = make_vocabulary(configs.data, Path(tempfile.mkdtemp(dir=tmp_path)))
        stream = TrainStream(configs.data, vocabulary, seed=0, use_rationales=use_rationales)
        epochs = [stream.counts(step) for step in range(stream.num_examples)]  # eight
        source = sum(counts.source_tokens for counts in epochs) / len(epochs)
        target = sum(counts.target_tokens for counts in epochs) / len(epochs)
        step_flops += train_step_flops(configs.model, source, target)
    expected = 2 * steps * step_flops / 1e15
    found = float(re.search(r"12 missing runs: ([\d,.e+]+) PFLOPs", printed)[1].replace(",", ""))
    assert found == pytest.approx(expected, rel=1e-3)
    hours = float(re.search(r"NVIDIA H100 +([\d,.]+)", printed)[1].replace(",", ""))
    assert hours == pytest.approx(expected / (0.35 * 0.989) / 3600, abs=0.006)
    assert hours > 0.1
    assert not runs.exists()


def test_an_estimate_is_made_of_mixtures_too(tmp_path, capsys):
    (records, _) = explained(tmp_path, train=8)
    file = tmp_path / "sweep.gin"
    file.write_text(
        "from __gin__ import dynamic_registration\nfrom dslt import sweep\n"
        f"sweep.SweepConfig.records = ({records!r},)\n"
        "sweep.SweepConfig.settings = ('settings/facts.gin',)\n"
        "sweep.SweepConfig.methods = ('runs/fine_tuning.gin',)\n"
    )
    mixture = "pipeline.DataConfig.mixture_rates = {'facts': 1}"
    args = ["sweep", str(file), "--output_dir", str(tmp_path / "runs"), "--estimate"]
    capsys.readouterr()
    printed = []
    for overrides in (SMALL[2:], (*SMALL[2:], mixture)):
        assert main([*args, "--gin", f"sweep.SweepConfig.overrides = {overrides!r}"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_what_fails_is_said_and_does_not_stop_the_rest(swept):
    """In processes of their own; the run that was done before is not done again."""
    args, directory, only = swept
    before = (directory / only / "run.json").stat().st_mtime_ns
    command = [sys.executable, "-m", "dslt.main", *args, "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "3 runs, 1 of them done" in done.stdout
    assert "facts-broken-50pct-seed0: failed with status 2" in done.stdout
    assert "expected train.TrainConfig.rationale_weight = 0" in done.stdout
    assert is_done(RunDir(directory / "facts-fine_tuning-50pct-seed0"), ("validation", "test"))
    assert (directory / only / "run.json").stat().st_mtime_ns == before


def test_a_run_that_cannot_be_started_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "arguments", lambda args, name: ["--help"])  # done at once
    (tmp_path / "a").touch()
    assert command.run_all(argparse.Namespace(jobs=2), ["a", "b", "c"], tmp_path) == 1
    printed = capsys.readouterr()
    assert "a: cannot be started ([Errno 17] File exists" in printed.err
    assert "1 failed: a; the same command tries them again" in printed.err
    assert "b: no validation split" in printed.out and "c: no validation split" in printed.out


def test_a_failed_run_without_a_log_does_not_stop_the_rest(tmp_path, monkeypatch, capsys):
    def start_run(args, name, *_):
        (tmp_path / name).mkdir()
        return subprocess.Popen([sys.executable, "-c", f"raise SystemExit({name == 'a'})"])

    monkeypatch.setattr(command, "start_run", start_run)
    assert command.run_all(argparse.Namespace(jobs=1), ["a", "b"], tmp_path) == 1
    printed = capsys.readouterr()
    log = tmp_path / "a" / "log.txt"
    assert f"a: failed with status 1; {log} cannot be read (No such file" in printed.out
    assert "b: no validation split" in printed.out
    assert "1 failed: a; the same command tries them again" in printed.err


def test_whatever_ends_a_sweep_stops_the_runs_that_it_started(tmp_path, monkeypatch):
    started = []

    def start_run(*_):
        if started:
            raise MemoryError
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        return started[0]

    monkeypatch.setattr(command, "start_run", start_run)
    with pytest.raises(MemoryError):
        command.run_all(argparse.Namespace(jobs=2), ["a", "b"], tmp_path)
    assert started[0].poll() == -signal.SIGTERM


def test_a_run_that_another_process_works_on_is_left_to_it(swept, capsys):
    import fcntl

    args, directory, only = swept
    with (directory / only / ".sweep.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main([*args, "--only", only]) == 75
    assert "another process works on this run" in capsys.readouterr().err


def test_an_unknown_run_is_one_message(swept, capsys):
    assert main([*swept[0], "--only", "nothing"]) == 2
    assert "is no run of this sweep" in capsys.readouterr().err


def test_a_student_of_one_target_answers_with_its_label(swept, records, capsys):
    """And is not asked for what it has not learnt."""
    _, directory, only = swept
    predict = ["predict", "--student", str(directory / only), records[0], "--limit", "2"]
    assert main([*predict, "--max_label_length", "8"]) == 0
    assert capsys.readouterr().out.count('"prediction"') == 2
    assert main([*predict, "--rationales"]) == 2
    assert "target_layout 'rationale_label'" in capsys.readouterr().err


def test_the_compute_of_two_tasks_buys_fine_tuning_more_steps(records, tmp_path):
    from dslt.commands.sweep import budget_overrides

    sweep = SweepConfig(
        records=records[:1],
        settings=("settings/facts.gin",),
        methods=("runs/fine_tuning.gin",),
        seeds=(0,),
        budgets=("steps", "compute"),
        overrides=SMALL,
    )
    steps, compute = expand(sweep, config.parse)
    assert budget_overrides(steps, RunDir(tmp_path / "a")) == []
    overrides = budget_overrides(compute, RunDir(tmp_path / "b"))
    found = config.parse(compute.gin_files, [*compute.overrides, *overrides])
    assert 8 <= found.train.num_steps <= 24  # twice the source, and a longer target
    assert found.train.save_every_steps == round(found.train.num_steps / 2)
    assert dataclasses.replace(found.train, num_steps=4, save_every_steps=2) == (
        config.parse(steps.gin_files, steps.overrides).train
    )
