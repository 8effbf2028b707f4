"""`dslt evaluate` on a trained run: what it judges, keeps as the best, says and refuses."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from dslt import evaluate as judging
from dslt.checkpoint.manager import CheckpointManager, finished_steps
from dslt.data.vocabulary import SENTENCEPIECE_FILE, train_sentencepiece
from dslt.main import main
from dslt.records import read_examples, read_predictions
from dslt.workdir import RunDir, read_json, read_json_rows, write_json_rows


def test_evaluation_judges_every_checkpoint_and_keeps_the_best_on_validation(run, records):
    rows = read_json_rows(run.evaluations)
    assert [row["step"] for row in rows] == [3, 6]
    best = max(rows, key=lambda row: (row["validation/accuracy"], -row["step"]))
    with CheckpointManager(run.best, read_only=True) as manager:
        assert manager.steps() == [best["step"]]
    predictions = list(read_predictions(run.evaluation(3) / "predictions.jsonl"))
    held_out = [e for e in read_examples(records) if e.split != "train"]
    assert sorted(p.id for p in predictions) == sorted(e.id for e in held_out)
    assert all(p.rationale is not None and p.is_correct is not None for p in predictions)
    assert {p.id: p.teacher_rationale for p in predictions} == {e.id: e.rationale for e in held_out}
    hits = [p.is_correct for p in predictions if p.split == "validation"]
    assert rows[0]["validation/accuracy"] == pytest.approx(np.mean(hits))


def test_evaluating_again_adds_nothing(run, capsys):
    before = run.evaluations.read_text()
    assert main(["evaluate", "--run_dir", str(run.path), "--follow"]) == 0
    assert run.evaluations.read_text() == before
    assert "best on validation" in capsys.readouterr().out


def test_two_processes_do_not_evaluate_one_run(run, capsys):
    with run.held("evaluate"):
        assert main(["evaluate", "--run_dir", str(run.path), "--follow"]) == 2
    says = f"{run.path}: another `dslt evaluate` works here"
    assert says in capsys.readouterr().err


def test_predictions_are_scored_again_without_a_model(run, capsys):
    path = run.evaluation(6) / "predictions.jsonl"
    assert main(["evaluate", "--predictions", str(path)]) == 0
    row = read_json_rows(run.evaluations)[-1]
    assert f"validation {100 * row['validation/accuracy']:.1f} % of 12" in capsys.readouterr().out


def test_one_checkpoint_is_judged_again_with_other_settings(run, capsys):
    before = read_json_rows(run.evaluations)
    args = ["--step", "3", "--gin", "evaluate.EvalConfig.with_rationales = False"]
    assert main(["evaluate", "--run_dir", str(run.path), *args]) == 0
    after = read_json_rows(run.evaluations)
    assert [row["step"] for row in after] == [3, 6]
    assert after[0] | {"secs": 0} == before[0] | {"secs": 0} and after[1] == before[1]
    predictions = list(read_predictions(run.evaluation(3) / "predictions.jsonl"))
    assert all(p.rationale is None for p in predictions)


def test_a_step_that_was_judged_on_test_alone_is_judged_on_validation_too(run, tmp_path, capsys):
    copy = RunDir(Path(shutil.copytree(run.path, tmp_path / "run")))
    before = read_json_rows(copy.evaluations)
    of_test = [
        {name: x for name, x in row.items() if not name.startswith("validation/")} for row in before
    ]
    write_json_rows(copy.evaluations, of_test)
    shutil.rmtree(copy.best)
    evaluate = ["evaluate", "--run_dir", str(copy.path)]
    assert main([*evaluate, "--gin", "evaluate.EvalConfig.splits = ('test',)"]) == 0
    assert "No checkpoint was judged on validation" in capsys.readouterr().out
    assert read_json_rows(copy.evaluations) == of_test
    assert main(evaluate) == 0
    assert finished_steps(copy.best) == finished_steps(run.best)
    rows = read_json_rows(copy.evaluations)
    assert [row | {"secs": 0} for row in rows] == [row | {"secs": 0} for row in before]


def test_a_student_with_fewer_embeddings_than_its_vocabulary_has_ids_is_not_judged(
    run, tmp_path, capsys
):
    copy = RunDir(Path(shutil.copytree(run.path, tmp_path / "run")))
    texts = [f"{n} {n * n} {n**3}" for n in range(1000)]
    size = train_sentencepiece(texts, 600, copy.vocabulary / SENTENCEPIECE_FILE).size
    before = copy.evaluations.read_bytes()
    assert main(["evaluate", "--run_dir", str(copy.path), "--step", "6"]) == 2
    captured = capsys.readouterr()
    assert f"vocabulary '{copy.vocabulary}' has {size} ids, but {copy.path} embeds 512" in (
        captured.err
    )
    assert not captured.out and copy.evaluations.read_bytes() == before


def test_what_is_known_of_splits_that_are_not_judged_again_stays(run, tmp_path, capsys):
    copy = RunDir(Path(shutil.copytree(run.path, tmp_path / "run")))
    [best] = finished_steps(copy.best)
    files = [copy.evaluation(best) / name for name in ("metrics.json", "predictions.jsonl")]
    before = read_json_rows(copy.evaluations), read_json(files[0]), list(read_predictions(files[1]))
    args = ["--step", str(best), "--gin", "evaluate.EvalConfig.splits = ('test',)"]
    assert main(["evaluate", "--run_dir", str(copy.path), *args]) == 0
    assert finished_steps(copy.best) == [best]
    assert f"best on validation: step {best}:" in capsys.readouterr().out
    rows, figures = read_json_rows(copy.evaluations), read_json(files[0])
    timeless = [[row | {"secs": 0} for row in each] for each in (rows, before[0])]
    assert timeless[0] == timeless[1] and figures | {"secs": 0} == before[1] | {"secs": 0}
    was, now = (
        sorted((p.split, p.id, p.prediction) for p in each)
        for each in (before[2], read_predictions(files[1]))
    )
    assert now == was and {split for split, *_ in now} == {"validation", "test"}


def test_a_best_checkpoint_judged_again_and_worse_gives_way(run, tmp_path, capsys):
    copy = RunDir(tmp_path / "run")
    shutil.copytree(run.path, copy.path)
    [best] = finished_steps(copy.best)
    [other] = {3, 6} - {best}
    rows = read_json_rows(copy.evaluations)
    write_json_rows(
        copy.evaluations,
        [row | {"validation/accuracy": 1.0} if row["step"] == other else row for row in rows],
    )
    again = ["evaluate", "--run_dir", str(copy.path), "--step", str(best)]
    assert main(again) == 0
    assert finished_steps(copy.best) == [other]
    assert f"best on validation: step {other}:" in capsys.readouterr().out
    shutil.rmtree(copy.checkpoints / str(other))
    shutil.rmtree(copy.best)
    shutil.copytree(run.best, copy.best)
    assert main(again) == 0
    assert f"but its checkpoint is gone; {copy.best} still holds" in capsys.readouterr().out


def test_checkpoints_judged_with_other_settings_are_compared_with_one_another(
    run, tmp_path, capsys
):
    copy = RunDir(tmp_path / "run")
    shutil.copytree(run.path, copy.path)
    before = [row | {"secs": 0} for row in read_json_rows(copy.evaluations)]
    plain = ["evaluate", "--run_dir", str(copy.path)]
    override = "evaluate.EvalConfig.max_label_length = 1"
    assert main([*plain, "--step", "3", "--gin", override]) == 0
    assert [row.get("overrides") for row in read_json_rows(copy.evaluations)] == [override, None]
    assert finished_steps(copy.best) == [6]
    said = capsys.readouterr().out
    assert "best on validation: step 6" in said
    assert "judged with other settings, and not compared: step 3" in said
    assert main([*plain, "--gin", override]) == 0
    rows = read_json_rows(copy.evaluations)
    assert [row["overrides"] for row in rows] == [override] * 2
    assert "not compared" not in capsys.readouterr().out
    assert finished_steps(copy.best) == [judging.best_row(rows)["step"]]
    assert main(plain) == 0
    assert [row | {"secs": 0} for row in read_json_rows(copy.evaluations)] == before
    assert finished_steps(copy.best) == finished_steps(run.best)


def test_an_override_of_what_evaluation_does_not_use_is_refused(run, records, capsys):
    of_data = (f"records = ({str(records)!r},)", "max_input_length = 99", "batch_examples = 7")
    bindings = [
        "t5.T5Config.d_model = 9999",
        "train.TrainConfig.num_steps = 77",
        "evaluate.EvalConfig.rows = 3",
        "sharding.MeshConfig.fsdp = 2",
        *(f"pipeline.DataConfig.{binding}" for binding in of_data),
    ]
    gin = [part for binding in bindings for part in ("--gin", binding)]
    assert main(["evaluate", "--run_dir", str(run.path), *gin]) == 2
    lines = capsys.readouterr().err.splitlines()
    start = next(i for i, line in enumerate(lines) if "evaluation does not use" in line)
    assert sorted(lines[start + 1 : start + 4]) == [
        "  pipeline.DataConfig.batch_examples: was 8, now 7",
        "  t5.T5Config.d_model: was 16, now 9999",
        "  train.TrainConfig.num_steps: was 6, now 77",
    ]
    assert lines[start + 4].startswith("The student is as it was trained.")


def test_a_row_that_is_none_is_named_before_anything_is_decoded(run, tmp_path, monkeypatch, capsys):
    copy = RunDir(Path(shutil.copytree(run.path, tmp_path / "run")))
    copy.evaluations.write_text('{"step": 6, "validation/accuracy": "high"}\n')
    monkeypatch.setattr(judging, "predict", lambda *_: pytest.fail("has decoded"))
    for more in ([], ["--step", "3"]):
        assert main(["evaluate", "--run_dir", str(copy.path), *more]) == 2
        assert f"{copy.evaluations}:1: is no row of this file" in capsys.readouterr().err


def test_a_step_that_is_not_there_is_not_judged(run, capsys):
    assert main(["evaluate", "--run_dir", str(run.path), "--step", "5"]) == 2
    assert str(run.checkpoints) in capsys.readouterr().err


def test_judging_on_other_records_than_were_trained_on_is_said(run, records, capsys):
    info = read_json(run.info)
    try:
        run.update_info(records={str(records): "another digest"})
        assert main(["evaluate", "--run_dir", str(run.path)]) == 0
    finally:
        run.update_info(**info)
    assert f"warning: {records} has changed since the run began" in capsys.readouterr().out
