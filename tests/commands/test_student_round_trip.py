"""A student that was exported or imported answers as before, and training starts from it."""

import json
import shutil

import pytest
from small_run import train_args

from dslt.data.vocabulary import load_vocabulary
from dslt.main import main
from dslt.workdir import RunDir, read_json_rows


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
