"""The whole job through the command line, on a student that trains in seconds."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from dslt import evaluate as judging
from dslt import mirror
from dslt.checkpoint.manager import CheckpointManager, finished_steps
from dslt.commands.students import make_answer_sets
from dslt.data.vocabulary import load_vocabulary
from dslt.errors import InputError
from dslt.evaluate import EvalConfig
from dslt.main import main
from dslt.mirror import RunBucket
from dslt.records import read_examples, read_predictions
from dslt.signals import INTERRUPTED
from dslt.workdir import RunDir, read_json, read_json_rows, write_json_rows

SMALL = (
    "t5.T5Config.d_model = 16",
    "t5.T5Config.d_kv = 8",
    "t5.T5Config.d_ff = 32",
    "t5.T5Config.num_heads = 2",
    "pipeline.DataConfig.batch_examples = 8",
    "train.TrainConfig.num_steps = 6",
    "train.TrainConfig.save_every_steps = 3",
    "train.TrainConfig.log_every_steps = 2",
    "evaluate.EvalConfig.max_label_length = 8",
    "evaluate.EvalConfig.max_rationale_length = 16",
    "evaluate.EvalConfig.with_rationales = True",
)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    directory = tmp_path_factory.mktemp("records")
    sizes = ["--train", "60", "--validation", "12", "--test", "12"]
    args = ["--dataset", "facts", "--teacher", "scripted", "--mistake_rate", "0.2"]
    assert main(["extract", *args, *sizes, "--output_dir", str(directory)]) == 0
    return directory / "records.jsonl"


def train_args(records, run_dir, *overrides, method="step_by_step"):
    bindings = (f"pipeline.DataConfig.records = ({str(records)!r},)", *SMALL, *overrides)
    gin = [part for binding in bindings for part in ("--gin", binding)]
    return ["train", f"runs/{method}.gin", "settings/facts.gin", "--run_dir", str(run_dir), *gin]


@pytest.fixture(scope="module")
def run(records, tmp_path_factory):
    """A trained and evaluated run."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    assert main(train_args(records, directory)) == 0
    assert main(["evaluate", "--run_dir", str(directory)]) == 0
    return RunDir(directory)


def final_params(run):
    with CheckpointManager(run.checkpoints, read_only=True) as manager:
        step = manager.steps()[-1]
    path = run.checkpoints / str(step)
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(path / "params")
    return step, jax.tree.map(np.asarray, tree)


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


def test_export_answers_as_predict_does_and_as_transformers_do(run, records, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    student = tmp_path / "student"
    assert main(["export", "--student", str(run.path), "--output_dir", str(student)]) == 0
    answers = {}
    for source in (run.path, student):
        capsys.readouterr()
        args = ["--student", str(source), "--split", "test", "--rationales"]
        limits = ["--max_label_length", "8", "--max_rationale_length", "8"]
        assert main(["predict", *args, *limits, str(records)]) == 0
        answers[source] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert answers[run.path] == answers[student]
    assert len(answers[student]) == 12 and answers[student][0]["teacher_rationale"]

    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(student)
    tokenizer = transformers.AutoTokenizer.from_pretrained(student)
    vocabulary = load_vocabulary(student)
    for row in answers[student]:
        ids = tokenizer("predict: " + row["input"], return_tensors="pt").input_ids
        assert ids[0].tolist() == [*vocabulary.encode("predict: " + row["input"]), 1]
        with torch.no_grad():
            output = model.generate(ids, max_new_tokens=8, do_sample=False)
        tokens = [token for token in output[0].tolist()[1:] if token != 1]
        assert vocabulary.decode(tokens) == row["prediction"]


def test_import_and_init_from_start_where_the_export_ended(run, records, tmp_path, capsys):
    student, imported = tmp_path / "student", tmp_path / "imported"
    assert main(["export", "--student", str(run.path), "--output_dir", str(student)]) == 0
    flags = ["--hugging_face", str(student), "--output_dir", str(imported)]
    assert main(["import", *flags]) == 0
    capsys.readouterr()
    answers = []
    for source in (student, imported):
        assert main(["predict", "--student", str(source), "--limit", "4", str(records)]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and answers[0].count("\n") == 4
    losses = []
    for source in (student, imported, run.path):
        directory = tmp_path / f"from_{source.name}"
        start = (
            f"train.TrainConfig.init_from = {str(source)!r}",
            "train.TrainConfig.num_steps = 2",
        )
        vocabulary = f"pipeline.DataConfig.vocabulary = {str(student)!r}"
        assert main(train_args(records, directory, *start, vocabulary)) == 0
        losses.append(read_json_rows(RunDir(directory).metrics)[0]["loss"])
    assert losses[0] == losses[1] == losses[2]


def test_parameters_of_another_vocabulary_are_no_start(run, records, tmp_path, capsys):
    bytes_ = "pipeline.DataConfig.vocabulary = 'bytes'"
    newest = run.path / "checkpoints" / "6"
    for source in (run.path, newest):
        start = f"train.TrainConfig.init_from = {str(source)!r}"
        assert main(train_args(records, tmp_path / "run", start, bytes_)) == 2
        found = capsys.readouterr().err
        assert f"expected pipeline.DataConfig.vocabulary = {str(run.vocabulary)!r}" in found
    alone = tmp_path / "alone" / "checkpoints"
    shutil.copytree(newest, alone / "6")
    start = f"train.TrainConfig.init_from = {str(alone.parent)!r}"
    steps = "train.TrainConfig.num_steps = 1"
    vocabulary = f"pipeline.DataConfig.vocabulary = {str(run.vocabulary)!r}"
    assert main(train_args(records, tmp_path / "run", start, steps, vocabulary)) == 0
    assert f"warning: whether {alone.parent} is of the vocabulary" in capsys.readouterr().out


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


def test_plain_text_lines_are_inputs(run, tmp_path, capsys):
    texts = ["premise: ann has a cup .", "premise: bob has a hat ."]
    (tmp_path / "inputs.txt").write_text("\n\n".join(texts))
    assert main(["predict", "--student", str(run.path), str(tmp_path / "inputs.txt")]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["input"] for row in rows] == [
        "premise: ann has a cup .",
        "premise: bob has a hat .",
    ]
    assert all(row.keys() == {"input", "prediction"} for row in rows)


@pytest.fixture
def one_device(monkeypatch):
    """Eight simulated devices would compile and run each program eight times."""
    devices = jax.devices
    monkeypatch.setattr(jax, "devices", lambda *args: devices(*args)[:1])


LABELS = ("entailment", "contradiction", "neutral")
LABEL_FLAGS = [part for label in LABELS for part in ("--label", label)]


def test_predict_decodes_by_each_strategy(run, records, one_device, capsys):
    def rows(*flags):
        capsys.readouterr()
        args = ["--student", str(run.path), "--limit", "5", "--max_label_length", "16"]
        assert main(["predict", *args, *flags, str(records)]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    greedy = rows()
    assert rows("--strategy", "sample", "--top_k", "1") == greedy
    assert rows("--strategy", "beam", "--num_beams", "1") == greedy
    sampled, other = (rows("--strategy", "sample", "--seed", seed) for seed in "01")
    assert sampled != other and sampled != greedy
    chosen = rows("--answers", "trie", *LABEL_FLAGS)
    assert all(row["prediction"] in LABELS for row in chosen)
    for row in rows(*LABEL_FLAGS):  # likelihood is what labels alone mean
        assert sum(row["distribution"].values()) == pytest.approx(1.0)
        assert row["prediction"] == max(row["distribution"], key=row["distribution"].get)
        assert row["probability"] == row["distribution"][row["prediction"]]
        assert row["distribution"].keys() == set(LABELS)


def test_a_checkpoint_is_judged_by_the_likelihood_of_labels(run, tmp_path, one_device):
    copy = RunDir(Path(shutil.copytree(run.path, tmp_path / "run")))
    bindings = ("answers = 'likelihood'", f"labels = {LABELS!r}", "with_rationales = False")
    gin = [part for text in bindings for part in ("--gin", f"evaluate.EvalConfig.{text}")]
    assert main(["evaluate", "--run_dir", str(copy.path), "--step", "6", *gin]) == 0
    predictions = list(read_predictions(copy.evaluation(6) / "predictions.jsonl"))
    assert len(predictions) == 24 and all(p.prediction in LABELS for p in predictions)
    assert all(1 / 3 <= p.probability < 1 for p in predictions)
    row = read_json_rows(copy.evaluations)[-1]
    hits = [p.is_correct for p in predictions if p.split == "validation"]
    assert row["validation/accuracy"] == pytest.approx(np.mean(hits))


def test_labels_that_are_the_same_tokens_are_no_set_to_judge_by(run, capsys):
    labels = "evaluate.EvalConfig.labels = ('日本', '中国')"
    gin = ["--gin", labels, "--gin", "evaluate.EvalConfig.answers = 'trie'"]
    assert main(["evaluate", "--run_dir", str(run.path), "--step", "6", *gin]) == 2
    assert "the labels '日本' and '中国' are the same tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--num_beams", "3"], "--num_beams given, but the strategy is 'greedy'; expected --str"),
        (["--strategy", "beam", "--top_k", "3", "--seed", "1"], "--top_k, --seed given, but"),
        (["--strategy", "sample", "--early_stopping"], "expected --strategy beam with it"),
        (["--max_rationale_length", "3"], "--max_rationale_length given, but answers is 'open'"),
        (["--label", "a", "--strategy", "beam", "--num_beams", "3"], "expected --rationales with"),
        (["--strategy", "sample", "--top_p", "2"], "top_p is 2.0; expected 0 < top_p <= 1"),
        (["--answers", "trie", "--strategy", "beam"], "expected strategy 'greedy', or answers"),
        (["--answers", "open", "--label", "a"], "expected 'trie' or 'likelihood' to answer with"),
        (["--answers", "trie"], "input 1: answers is 'trie', but its text lists no `Answer Choi"),
        (["--label", "a", "--label", ""], "the label '' is blank; expected text"),
        (
            ["--label", "日本", "--label", "中国"],
            "the labels '日本' and '中国' are the same tokens",
        ),
        (["--label", "x" * 99], "tokens; expected at most max_label_length = 64"),
    ],
    ids=" ".join,
)
def test_flags_that_do_not_go_together_are_one_message(flags, says, run, records, capsys):
    assert main(["predict", "--student", str(run.path), *flags, str(records)]) == 2
    captured = capsys.readouterr()
    assert says in captured.err and "Traceback" not in captured.err and not captured.out


def test_labels_that_are_the_same_tokens_are_refused_and_choices_counted(capsys):
    vocabulary = types.SimpleNamespace(encode=lambda text: [len(text)])
    config = EvalConfig(answers="trie", labels=("one", "three", "one"))
    [answers] = make_answer_sets([("input 1", "?")], config, vocabulary)
    assert answers.texts == ("one", "three") and answers.tokens == ((3, 1), (5, 1))
    config = EvalConfig(answers="trie", labels=("one", "three", "two"))
    with pytest.raises(InputError, match=r"^the labels 'one' and 'two' are the same tokens"):
        make_answer_sets([("input 1", "?")], config, vocabulary)
    listed = "which ?\nAnswer Choices:\n(a) cat\n(b) mouse\n"
    alike = ("input 2", listed + "(c) dog\n")
    config = EvalConfig(answers="trie")
    sets = make_answer_sets([("input 1", listed), alike, alike], config, vocabulary)
    assert [answers.texts for answers in sets] == [("cat", "mouse")] * 3
    assert "warning: 2 of 3 inputs list choices" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"^input 2: the choices 'cat' and 'dog' are the same"):
        make_answer_sets([alike], config, vocabulary, is_strict=True)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.TrainConfig.rationale_wait = 1.0", "did you mean rationale_weight?"),
        ("sharding.MeshConfig.pipeline = 2", "expected one of: data, fsdp, tensor"),
        ("train.TrainConfg.seed = 1", "Expected one of: train.TrainConfig"),
        ("TrainConfig.seed = 1", "Expected one of: train.TrainConfig"),
        ("rationale_weight = 0.5", "rationale_weight binds nothing here; write the full name"),
        ("a/train.TrainConfig.seed = 1", "a/train.TrainConfig.seed binds nothing here"),
        ("train.TrainConfig.keep_checkpoints = 0", "keep_checkpoints is 0; expected >= 1"),
        ("t5.T5Config.num_heads = 0", "num_heads is 0; expected >= 1"),
        ("t5.T5Config.relative_attention_max_distance = -5", "expected more than half of"),
        ("optimizer.OptimizerConfig.beta1 = 1.0", "beta1 is 1.0; expected 0 <= beta1 < 1"),
        ("evaluate.EvalConfig.rows = 0", "rows is 0; expected >= 1"),
        ("train.TrainConfig.rationale_weight = 'one'", "is 'one'; expected float"),
        ("train.TrainConfig.rationale_weight = -1.0", "expected 0 or more"),
        (
            "train.TrainConfig.consistency_weight = 1.0\ntrain.TrainConfig.accumulation_steps = 2",
            "accumulation_steps 2; expected 1",
        ),
        ("train.TrainConfig.seed = ", "line"),
        ("t5.T5Config.dtype = 'float16'", "expected 'float32' or 'bfloat16'"),
        ("t5.T5Config.vocab_size = 8", "expected at least as many"),
        ("pipeline.DataConfig.records = ('none.jsonl',)", "none.jsonl"),
        ("pipeline.DataConfig.records = 'records.jsonl'", "expected tuple"),
        ("pipeline.DataConfig.vocabulary = 'none.model'", "none.model: cannot be read"),
        ("sharding.MeshConfig.tensor = 3", "choose sizes whose product is the device count"),
        ("train.TrainConfig.init_from = 'none'", "none: found neither a checkpoint nor"),
    ],
)
def test_a_mistyped_config_is_one_message_and_no_run(override, says, records, tmp_path, capsys):
    assert main(train_args(records, tmp_path / "run", override)) == 2
    captured = capsys.readouterr()
    assert says in captured.err and "Traceback" not in captured.err
    assert not RunDir(tmp_path / "run").has_checkpoints()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["train", "runs/none.gin", "--run_dir", "x"], "Shipped gin files: "),
        (["extract", "--dataset", "mine", "--output_dir", "x"], "expected --data_dir"),
        (["evaluate", "--run_dir", "none"], "expected a directory of `dslt train`"),
        (["evaluate", "--predictions", "none.jsonl"], "none.jsonl: cannot be read"),
        (["evaluate", "--predictions", "x", "--follow"], "expected no --follow, --step or --gin"),
        (["evaluate", "--run_dir", "x", "--follow", "--step", "3"], "expected no --follow beside"),
        (
            ["extract", "--dataset", "facts", "--output_dir", "x", "--model", "m", "--dry_run"],
            "--model, --dry_run given, but no teacher; expected --teacher endpoint",
        ),
        (["predict", "--student", "none", "x.txt"], "none: is no directory"),
        (["export", "--student", "none", "--output_dir", "x"], "none: is no directory"),
        (["import", "--hugging_face", "none", "--output_dir", "x"], "none"),
    ],
)
def test_what_is_not_there_is_one_message(args, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    captured = capsys.readouterr()
    assert says in captured.err and "Traceback" not in captured.err


def test_a_table_of_ones_own_becomes_records_without_code(tmp_path, capsys):
    table = tmp_path / "mine.csv"
    rows = [f"what is {i} ?,answer {i},because {i}" for i in range(20)]
    table.write_text("question,answer,why\n" + "\n".join(rows) + "\n")
    columns = ["--input_column", "question", "--label_column", "answer"]
    flags = ["--input_file", str(table), *columns, "--rationale_column", "why"]
    out = tmp_path / "records"
    assert main(["extract", "--dataset", "mine", *flags, "--output_dir", str(out)]) == 0
    examples = list(read_examples(out / "records.jsonl"))
    assert [e.split for e in examples].count("validation") == 2
    assert all(e.rationale and e.label for e in examples)
    assert "20 examples, 20 with a rationale" in capsys.readouterr().out


def test_a_table_of_test_rows_alone_is_read_too(tmp_path):
    table = tmp_path / "mine.jsonl"
    table.write_text('{"q": "what is it ?", "split": "test"}\n')
    flags = ["--input_file", str(table), "--input_column", "q", "--split_column", "split"]
    out = str(tmp_path / "records")
    assert main(["extract", "--dataset", "mine", *flags, "--output_dir", out]) == 0
    assert [e.split for e in read_examples(tmp_path / "records" / "records.jsonl")] == ["test"]


def test_an_unwritable_place_is_one_message(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    flags = ["--teacher", "scripted", "--train", "3", "--validation", "0", "--test", "0"]
    out = str(tmp_path / "file" / "records")
    assert main(["extract", "--dataset", "facts", *flags, "--output_dir", out]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_help_answers_without_the_heavy_imports():
    code = (
        "import sys\nfrom dslt.main import build_parser\nbuild_parser().format_help()\n"
        "heavy = {'jax', 'numpy', 'gin', 'tensorflow', 'seqio', 'flax'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


def test_a_built_cache_trains_and_evaluates_without_tensorflow(run, records, tmp_path):
    """The token cache and the vocabulary of `run` are there; only their readers are imported."""
    args = train_args(records, tmp_path / "run", "train.TrainConfig.num_steps = 1")
    vocabulary = f"pipeline.DataConfig.vocabulary = {str(run.vocabulary)!r}"
    code = (
        "import sys\nfrom dslt.main import main\n"
        f"assert main({[*args, '--gin', vocabulary]!r}) == 0\n"
        f"assert main(['evaluate', '--run_dir', {str(tmp_path / 'run')!r}]) == 0\n"
        "assert not {'tensorflow', 'seqio'} & set(sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, stdout=subprocess.PIPE)


def test_huge_pages_are_asked_for_once_and_only_where_nothing_is_said(monkeypatch):
    class StartedAgain(Exception):
        pass

    def execv(program, arguments):
        assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
        raise StartedAgain(program, arguments)

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "argv", ["dslt", "predict", "--student", "none"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "dslt.main", "predict"])
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    with pytest.raises(StartedAgain) as found:
        main()
    assert found.value.args == (sys.executable, [sys.executable, "-m", "dslt.main", "predict"])
    assert main() == 2  # as the program that was started again: no third one
    monkeypatch.delenv("GLIBC_TUNABLES")
    assert main(["predict", "--student", "none"]) == 2  # called, not started from a shell


IN_HASTE = """
import os, signal, sys
from dslt import main, mirror
mirror.SYNC_SECS = 0.1
sys.exit(main.main(sys.argv[1:]))
"""
KILLED = IN_HASTE.replace(
    "sys.exit",
    """
write = mirror.RunBucket.write
def write_and_die(self, name, content):
    write(self, name, content)
    if name.endswith(mirror.MARKER):
        os.kill(os.getpid(), signal.SIGKILL)
mirror.RunBucket.write = write_and_die
sys.exit""",
)


@pytest.fixture(params=["directory", "s3"])
def url(request, tmp_path, monkeypatch):
    """Of a run in a directory as a store, or on a real S3 server, moto's, on loopback.

    For the latter: pip install 's3fs' 'moto[server]'. What can fail there is in test_mirror.py.
    """
    pytest.importorskip("fsspec", reason="fsspec is not installed (extra `remote`)")
    if request.param == "directory":
        yield f"file://{tmp_path}/store/run"
        return
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    thread = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    thread.start()
    host, port = thread.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "a secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    import boto3

    boto3.client("s3").create_bucket(Bucket="students")
    yield "s3://students/some/run"
    thread.stop()


@pytest.fixture
def start():
    """Starts the command on a machine of its own, as far as files tell."""
    processes = []

    def start(machine: Path, *args, code: str = IN_HASTE) -> subprocess.Popen:
        paths = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
        env = os.environ | {"PYTHONPATH": paths, "DSLT_MIRROR_DIR": str(machine)}
        command, pipe = [sys.executable, "-c", code, *args], subprocess.PIPE
        process = subprocess.Popen(
            command, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()


def test_a_killed_run_goes_on_on_another_machine_and_a_third_one_follows(
    url, run, records, start, tmp_path, monkeypatch, capsys
):
    """SIGKILL as soon as one checkpoint is whole in the bucket; the end is that of the undisturbed
    run, to the bit. The evaluator was there before the training, and judges its last checkpoint."""
    evaluator = start(tmp_path / "evaluator", "evaluate", "--run_dir", url, "--follow")
    first = start(tmp_path / "first", *train_args(records, url), code=KILLED)
    first.communicate(timeout=120)
    assert first.returncode == -signal.SIGKILL
    bucket = RunBucket(url)
    reached = max(bucket.checkpoints("checkpoints", bucket.find()))

    monkeypatch.setenv("DSLT_MIRROR_DIR", str(tmp_path / "second"))
    monkeypatch.setattr(mirror, "SYNC_SECS", 0.1)
    assert main(train_args(records, url)) == 0
    said = capsys.readouterr().out
    assert f"after step {reached}." in said and f"all is in {url}" in said
    (path,) = (tmp_path / "second").glob("*/train-*/run")
    jax.tree.map(np.testing.assert_array_equal, final_params(RunDir(path)), final_params(run))
    assert [row["step"] for row in read_json_rows(RunDir(path).metrics)] == [2, 4, 6]
    assert sorted(bucket.checkpoints("checkpoints", bucket.find())) == [3, 6]

    output = evaluator.communicate(timeout=60)[0]
    assert evaluator.returncode == 0 and "step 6: test" in output, output

    monkeypatch.setenv("DSLT_MIRROR_DIR", str(tmp_path / "third"))
    (tmp_path / "inputs.txt").write_text("premise: ann has a red ball .\n")
    assert main(["predict", "--student", url, str(tmp_path / "inputs.txt")]) == 0
    assert '"prediction"' in capsys.readouterr().out
    student = ["--student", f"{url}/checkpoints/6"]
    assert main(["export", *student, "--output_dir", str(tmp_path / "student")]) == 0
    fetched = {path.name for path in (tmp_path / "third").rglob("*")}
    assert "params" in fetched and "opt_state" not in fetched


@pytest.mark.parametrize("command", [["train", "runs/step_by_step.gin"], ["evaluate"]])
def test_several_processes_do_not_share_a_url(command, capsys):
    args = [*command, "--run_dir", "gs://key:secret@bucket/run", "--num_processes", "2"]
    assert main(args) == 2
    said = capsys.readouterr().err
    assert "gs://***@bucket/run: several processes share one directory; mount the bucket" in said
    assert "secret" not in said
