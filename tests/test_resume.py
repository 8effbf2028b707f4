"""The same `dslt train` again: a run ends as it would have undisturbed, or is refused."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from small_run import final_params, train_args

from dslt.checkpoint.manager import finished_steps
from dslt.data.vocabulary import load_vocabulary
from dslt.main import main
from dslt.signals import INTERRUPTED
from dslt.workdir import RunDir, read_json, read_json_rows


def test_training_a_finished_run_again_changes_nothing(run, records, capsys):
    before = run.metrics.read_text()
    assert main(train_args(records, run.path)) == 0
    assert "Nothing to do" in capsys.readouterr().out
    assert run.metrics.read_text() == before
    assert run.state() == "finished"  # or an evaluator that follows would wait for ever


def test_a_full_disk_stops_a_run_and_room_lets_it_end_as_it_would_have(
    run, records, small_disk, capsys
):
    """Each of six checkpoints is kept; there is room for a part of them."""
    disk, resize = small_disk("2m")
    often = ("train.TrainConfig.save_every_steps = 1", "train.TrainConfig.keep_checkpoints = 6")
    args = train_args(records, disk / "run", *often)
    assert main(args) == 2
    said = capsys.readouterr().err
    assert "the disk is full (No space left on device); 0." in said
    assert f" of 2.1 MB are free on the file system of {disk}" in said and f"at {disk}." in said
    stopped = finished_steps(RunDir(disk / "run").checkpoints)
    assert 0 < len(stopped) < 6
    resize("60m")
    assert main(args) == 0
    assert f"after step {stopped[-1]}." in capsys.readouterr().out
    rows = read_json_rows(RunDir(disk / "run").metrics)
    assert [row["step"] for row in rows] == [2, 4, 6]
    jax.tree.map(
        np.testing.assert_array_equal, final_params(RunDir(disk / "run")), final_params(run)
    )


def test_a_damaged_checkpoint_is_passed_over_by_each_command(run, records, tmp_path, capsys):
    copy = RunDir(tmp_path / "run")
    shutil.copytree(run.path, copy.path)
    copy.evaluations.unlink()
    shutil.rmtree(copy.path / "best")
    os.truncate(copy.checkpoints / "6" / "params" / "_METADATA", 100)
    student = ["--student", str(copy.path)]
    assert main(["export", *student, "--output_dir", str(tmp_path / "student")]) == 0
    said = capsys.readouterr().err
    assert "6/params: is damaged" in said and f"taking {copy.checkpoints / '3'} instead" in said
    explicit = ["--student", str(copy.checkpoints / "6")]
    assert main(["export", *explicit, "--output_dir", str(tmp_path / "other")]) == 2
    assert main(["predict", *explicit, str(records)]) == 2
    assert capsys.readouterr().err.count("6/params: is damaged") == 2
    assert main(["evaluate", "--run_dir", str(copy.path)]) == 0
    assert "6/params: is damaged" in capsys.readouterr().out
    assert [row["step"] for row in read_json_rows(copy.evaluations)] == [3]
    assert main(["evaluate", "--run_dir", str(copy.path), "--step", "6"]) == 2
    assert main(train_args(records, copy.path)) == 0
    assert "after step 3." in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, final_params(copy), final_params(run))
    assert (copy.path / "damaged" / "checkpoints-6").is_dir()


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(run, records, tmp_path, capsys):
    copy = RunDir(tmp_path / "run")
    shutil.copytree(run.path, copy.path)
    for path in (copy.checkpoints, copy.best, copy.evaluations):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = copy.metrics.read_text()
    assert main(train_args(records, copy.path)) == 2
    assert "its checkpoints are gone" in capsys.readouterr().err
    copy.update_info(state="running")
    assert main(train_args(records, copy.path, "train.TrainConfig.save_every_steps = 2")) == 2
    assert "its checkpoints are gone" in capsys.readouterr().err
    assert copy.metrics.read_text() == before


def test_a_run_does_not_resume_on_other_records(run, records, tmp_path, capsys):
    info = read_json(run.info)
    try:
        run.update_info(records={str(records): "another digest"})
        assert main(train_args(records, run.path)) == 2
        assert "the data changed since this run began" in capsys.readouterr().err
    finally:
        run.update_info(**info)


def test_a_second_attempt_with_another_vocabulary_leaves_nothing_of_the_first(records, tmp_path):
    wrong = "pipeline.DataConfig.vocabulary = 'bytes'"
    too_small = "t5.T5Config.vocab_size = 300"
    assert main(train_args(records, tmp_path / "run", wrong, too_small)) == 2
    steps = "train.TrainConfig.num_steps = 1"
    assert main(train_args(records, tmp_path / "run", steps)) == 0
    run = RunDir(tmp_path / "run")
    assert load_vocabulary(run.vocabulary).digest == read_json(run.info)["vocabulary_digest"]


def test_another_config_on_the_same_directory_is_refused_with_the_difference(run, records, capsys):
    args = train_args(records, run.path, "train.TrainConfig.rationale_weight = 0.25")
    assert main(args) == 2
    message = capsys.readouterr().err
    assert "train.TrainConfig.rationale_weight: was 1.0, now 0.25" in message
    assert "--branch_from" in message


def test_a_killed_run_resumes_to_the_same_parameters(run, records, tmp_path):
    """SIGTERM after the first logged step: the run saves; the same command ends as the other."""
    directory = tmp_path / "run"
    command = [sys.executable, "-m", "dslt.main", *train_args(records, directory)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    stopped = RunDir(directory)
    while process.poll() is None and not read_json_rows(stopped.metrics):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == INTERRUPTED and stopped.state() == "stopped"
    subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE)
    step, params = final_params(stopped)
    expected_step, expected = final_params(run)
    assert step == expected_step == 6
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    steps = [row["step"] for row in read_json_rows(stopped.metrics)]
    assert steps == sorted(set(steps)) and steps[-1] == 6
