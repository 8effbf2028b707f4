"""Runs are found and read whatever state they are in; what is wrong with one is said."""

import json
import os
from pathlib import Path

import pytest
from made_runs import make_rows, make_run, write_lines

from dslt.config import gin_directory, parse
from dslt.errors import InputError
from dslt.report.runs import find_runs, read_run
from dslt.workdir import best_row


def test_runs_are_found_at_any_depth_and_sorted_by_number(tmp_path):
    for name in ("a/s10", "a/s9", "b", "a/0.5", "a/0.25"):
        make_run(tmp_path / name)
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "records.jsonl").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / ".compile_cache").mkdir()
    (tmp_path / "out").mkdir()
    runs, passed_over = find_runs([tmp_path], skip=tmp_path / "out")
    assert [run.name for run in runs] == ["a/0.25", "a/0.5", "a/s9", "a/s10", "b"]
    assert all(run.problems == () for run in runs)
    assert [name for name, _ in passed_over] == ["empty", "records"]
    assert passed_over[0][1] == "is empty" and "has none of experiment.json" in passed_over[1][1]


def test_a_run_given_twice_is_read_once(tmp_path):
    run = make_run(tmp_path / "sweep" / "run")
    assert [run.name for run in find_runs([run, tmp_path, run])[0]] == ["run"]


def test_runs_whose_paths_end_alike_are_told_apart(tmp_path):
    for name in ("monday/runs/a", "tuesday/runs/a", "tuesday/runs/b"):
        make_run(tmp_path / name)
    (tmp_path / "monday/runs/none").mkdir()
    (tmp_path / "tuesday/runs/none").mkdir()
    runs = [tmp_path / "monday/runs/a", tmp_path / "tuesday/runs/a", tmp_path / "tuesday/runs/b"]
    expected = ["b", "monday/runs/a", "tuesday/runs/a"]
    assert [run.name for run in find_runs(runs)[0]] == expected
    found, passed_over = find_runs([tmp_path / "monday/runs", tmp_path / "tuesday/runs"])
    assert [run.name for run in found] == ["monday/runs/a", "runs/b", "tuesday/runs/a"]
    assert all(str(run.path).endswith(run.name) for run in found)
    assert [name for name, _ in passed_over] == ["monday/runs/none", "tuesday/runs/none"]


@pytest.mark.parametrize("mode", [0o000, 0o600])
def test_a_directory_that_cannot_be_read_is_passed_over(tmp_path, mode):
    make_run(tmp_path / "a")
    other = make_run(tmp_path / "b")
    other.chmod(mode)
    try:
        if os.access(other, os.R_OK | os.X_OK):
            pytest.skip("permissions do not bind this user")
        runs, passed_over = find_runs([tmp_path])
    finally:
        other.chmod(0o700)
    assert [run.name for run in runs] == ["a"]
    assert passed_over == [("b", "may not be read")]


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_where_there_is_no_run_it_is_said(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"is no directory|holds no run; expected directories of"):
        find_runs([tmp_path / name])


def cut_last_line(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


BREAKAGES = {
    "unfinished: is still training": lambda run: change_info(run, state="running"),
    "unfinished: was stopped": lambda run: change_info(run, state="stopped"),
    "unfinished: state is 'None'": lambda run: change_info(run, state=None),
    "unfinished: state is '??'": lambda run: change_info(run, state="\ud800?"),
    "unfinished: state is '{}'": lambda run: change_info(run, state={}),
    "run.json is missing": lambda run: (run / "run.json").unlink(),
    "run.json: expected a JSON object": lambda run: (run / "run.json").write_text("[1]"),
    "run.json: cannot be read as JSON": lambda run: (run / "run.json").write_bytes(b"\xff{"),
    "not judged yet": lambda run: (run / "evaluations.jsonl").unlink(),
    "not judged to its end: step 50 of 100": lambda run: cut_last_line(run / "evaluations.jsonl"),
    "evaluations.jsonl:1: no JSON object with a step": lambda run: write_lines(
        run / "evaluations.jsonl", [[], {"step": "x"}, {"step": float("nan")}]
    ),
    "metrics.jsonl:1: no JSON object": lambda run: (run / "metrics.jsonl").write_text(
        "[" * 100_000 + "\n"
    ),
    "metrics.jsonl: cannot be read": lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\n"),
    "no validation split was judged": lambda run: write_lines(
        run / "evaluations.jsonl", [{"step": 100, "test/accuracy": 0.5}]
    ),
    "predictions.jsonl: cannot be read (No such file": lambda run: (
        run / "evaluations" / "50" / "predictions.jsonl"
    ).unlink(),
    "1 unusable rows": lambda run: (run / "evaluations/50/predictions.jsonl").write_text("{}\n"),
    "experiment.json: cannot be read": lambda run: (run / "experiment.json").write_text("{"),
    "experiment.json: 'seed' is [0]": lambda run: (run / "experiment.json").write_text(
        '{"seed": [0]}'
    ),
    "experiment.json: fraction is 'half'": lambda run: (run / "experiment.json").write_text(
        '{"fraction": "half"}'
    ),
    "experiment.json: fraction is 2": lambda run: (run / "experiment.json").write_text(
        '{"fraction": 2}'
    ),
}


def change_info(run: Path, **fields) -> None:
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | fields))


@pytest.mark.parametrize("reason", BREAKAGES)
def test_what_is_wrong_with_a_run_is_its_problem_and_no_error(tmp_path, reason):
    path = make_run(tmp_path / "run")
    assert read_run(path, "run").problems == ()
    BREAKAGES[reason](path)
    problems = read_run(path, "run").problems
    assert problems and reason in "; ".join(problems)
    assert all(len(problem) < 310 and "\n" not in problem for problem in problems)


def test_a_run_started_by_hand_is_what_its_own_files_say(tmp_path):
    run = read_run(make_run(tmp_path / "a"), "a")
    assert run.settings == {
        "method": "step_by_step", "model": "263,168 parameters", "fraction": 1.0, "seed": 0,
        "rationale_weight": 1.0, "label_source": "gold", "variant": "", "budget": "steps",
        "is_augmented": "False",
    }  # fmt: skip
    assert run.datasets == "facts" and run.num_params == 263168
    path = make_run(tmp_path / "b", rationale_weight=0.0)
    assert read_run(path, "b").settings["method"] == "fine_tuning"
    config = path / "config.gin"
    config.write_text(config.read_text().replace("'gold'", "'teacher'"))
    assert read_run(path, "b").settings["method"] == "distillation"
    with config.open("a") as file:
        file.write("pipeline.DataConfig.augmentation = ('more.jsonl',)\n")
    assert read_run(path, "b").settings["is_augmented"] == "True"
    (path / "experiment.json").write_text('{"method": "mine", "fraction": 0.25, "teacher": "x"}')
    settings = read_run(path, "b").settings
    assert (settings["method"], settings["fraction"], settings["teacher"]) == ("mine", 0.25, "x")
    assert settings["seed"] == 0


METHODS = sorted((gin_directory() / "runs").glob("*.gin"))


@pytest.mark.parametrize("file", METHODS, ids=lambda path: path.stem)
def test_a_run_by_hand_is_of_the_method_that_its_gin_file_is_called(tmp_path, file):
    configs = parse([f"runs/{file.name}", "settings/facts.gin"])
    path = make_run(tmp_path / "run", rationale_weight=configs.train.rationale_weight)
    (path / "config.gin").write_text(configs.text)
    assert read_run(path, "run").settings["method"] == file.stem


def test_a_run_by_hand_is_on_the_share_of_the_data_that_it_learnt_from(tmp_path):
    path = make_run(tmp_path / "run")
    config = path / "config.gin"
    for share, fraction in (("0.25", 0.25), ("7", 1.0), ("'all'", 1.0)):
        config.write_text(f"pipeline.DataConfig.train_fraction = {share}\n")
        assert read_run(path, "run").settings["fraction"] == fraction


def test_the_best_row_is_chosen_by_validation_alone():
    rows = [
        {"step": 1, "validation/accuracy": 0.5, "test/accuracy": 0.9},
        {"step": 2, "validation/accuracy": 0.6, "test/accuracy": 0.1},
        {"step": 3, "validation/accuracy": 0.6, "test/accuracy": 0.8},
        {"step": 4, "test/accuracy": 1.0},
    ]
    assert best_row(rows)["step"] == 2
    assert best_row(rows[3:]) is None
    otherwise = {"step": 2, "validation/accuracy": 1.0, "overrides": "answers = 'likelihood'"}
    assert best_row([rows[0], otherwise, rows[2]])["step"] == 3
    assert best_row([*rows[:3], otherwise | {"step": 5}])["step"] == 5


def test_rows_judged_with_other_settings_are_not_compared(tmp_path):
    path = make_run(tmp_path / "run", make_rows(0, 0.5))
    better = {"step": 100, "validation/accuracy": 1.0, "overrides": "max_label_length = 1"}
    newest = {"step": 200, "validation/accuracy": 0.1}
    (path / "evaluations.jsonl").write_text(f"{json.dumps(better)}\n{json.dumps(newest)}\n")
    assert read_run(path, "run").best_step == 200


def test_numbers_that_are_none_are_left_out(tmp_path):
    path = make_run(tmp_path / "run", make_rows(0, 0.5))
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 200, "label_loss": NaN, "loss": "high", "rationale_loss": Infinity,')
        file.write(f'"label_accuracy": 1e300, "examples_per_sec": {10**400}}}\n')
    run = read_run(path, "run")
    assert run.problems == () and run.metrics[-1] == {"step": 200}


def test_a_line_that_a_kill_cut_off_is_left_out_without_a_word(tmp_path):
    path = make_run(tmp_path / "run")
    whole = read_run(path, "run").metrics
    cut_last_line(path / "metrics.jsonl")
    run = read_run(path, "run")
    assert run.problems == () and run.metrics == whole[:-1]
