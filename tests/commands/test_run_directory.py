"""What `dslt train` writes into a run's directory, by each method, and the report made from it."""

import csv

import jax
import pytest
from small_run import train_args

from dslt.main import main
from dslt.workdir import RunDir, read_json, read_json_rows


def test_a_run_directory_says_what_was_done(run, records):
    info = read_json(run.info)
    assert info["state"] == "finished"
    assert list(info["records"]) == [str(records)]
    assert info["versions"]["jax"] == jax.__version__
    assert "train.TrainConfig.rationale_weight = 1.0" in run.config.read_text()
    assert "t5.T5Config.d_model = 16" in run.config.read_text()
    rows = read_json_rows(run.metrics)
    assert [row["step"] for row in rows] == [2, 4, 6]
    for row in rows:
        assert row["label_tokens"] > 0 and row["rationale_tokens"] > row["label_tokens"]
        # The objective is the sum of both losses; the row's is a mean over two steps, whose token
        # counts differ a little.
        assert row["loss"] == pytest.approx(row["label_loss"] + row["rationale_loss"], rel=0.05)
    assert list(run.path.glob("events.out.tfevents*"))


def test_fine_tuning_builds_no_rationales_and_distillation_learns_the_teachers_labels(
    records, tmp_path, capsys
):
    outputs = {}
    for method in ("fine_tuning", "distillation", "step_by_step_teacher"):
        directory = tmp_path / method
        steps = "train.TrainConfig.num_steps = 2"
        assert main(train_args(records, directory, steps, method=method)) == 0
        outputs[method] = capsys.readouterr().out
        row = read_json_rows(RunDir(directory).metrics)[-1]
        has_rationales = method == "step_by_step_teacher"
        assert (row["rationale_tokens"] > 0) == ("rationale_loss" in row) == has_rationales
        assert ("explain: " in outputs[method].split("devices")[1]) == has_rationales
    assert "DataConfig.label_source = 'gold'" in outputs["fine_tuning"]
    assert "DataConfig.label_source = 'teacher'" in outputs["distillation"]


def test_a_report_is_made_from_the_runs_directory_alone(run, tmp_path, capsys):
    pytest.importorskip("sacrebleu", reason="needs '.[report]'")
    assert main(["report", str(run.path), "--output_dir", str(tmp_path)]) == 0
    assert "left out" not in capsys.readouterr().out
    best = max(read_json_rows(run.evaluations), key=lambda row: row["validation/accuracy"])
    with (tmp_path / "groups.csv").open(newline="") as file:
        [row] = csv.DictReader(file)
    assert float(row["test_accuracy"]) == pytest.approx(best["test/accuracy"])
    assert row["method"] == "step-by-step" and 0 < float(row["teacher_accuracy"]) < 1
    with (tmp_path / "rationales.csv").open(newline="") as file:
        [row] = csv.DictReader(file)
    assert row["rationales"] == "12" and float(row["teacher's words"]) > 5
