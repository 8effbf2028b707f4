"""Text is data: hostile problems, labels, ids and completions go through the job unchanged."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import (
    HALF_CHARACTERS,
    HOSTILE_NAMES,
    HOSTILE_STRINGS,
    SECRETS,
    SPRUNG,
    assert_no_secret,
)
from hostile_server import answering, completion

from dslt.main import main
from dslt.records import read_examples, read_predictions
from dslt.teacher.store import CompletionStore

pytest.importorskip("openai", reason="the openai library is not installed (extra `teacher`)")

ROOT = Path(__file__).parents[1]
COLUMNS = {"input": "q", "label": "a", "id": "id", "split": "part"}
GIN = (
    "pipeline.DataConfig.records = ('out/records/records.jsonl',)",
    "pipeline.DataConfig.vocabulary = 'train:700'",
    "t5.T5Config.vocab_size = 832",
    "t5.T5Config.d_model = 16",
    "t5.T5Config.d_kv = 8",
    "t5.T5Config.d_ff = 32",
    "t5.T5Config.num_heads = 2",
    "pipeline.DataConfig.batch_examples = 8",
    "pipeline.DataConfig.max_input_length = 64",
    "pipeline.DataConfig.max_target_length = 32",
    "train.TrainConfig.num_steps = 2",
    "train.TrainConfig.save_every_steps = 2",
    "train.TrainConfig.log_every_steps = 1",
    "evaluate.EvalConfig.max_label_length = 4",
    "evaluate.EvalConfig.with_rationales = True",
    "evaluate.EvalConfig.max_rationale_length = 4",
)


def table_rows():
    """Each string as a problem, the next one as its label, and another as the row's id."""
    texts = HOSTILE_STRINGS
    return [
        {
            "id": f"{texts[(i + 2) % len(texts)]} {i}",
            "q": text,
            "a": texts[(i + 1) % len(texts)],
            "part": ("train", "train", "validation", "test")[i % 4],
        }
        for i, text in enumerate(texts)
    ]


def said_to(prompt):
    """What the teacher says: the problem again, and the answer that a mark would find."""
    problem = prompt.removeprefix("Q: ")
    return f"{problem} So the answer is {problem[-2000:]}"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The whole job, secrets in its environment; yields its directory, its rows, what it printed.

    Some of the teacher's answers have half a character, some spell the key that they were sent.
    """
    directory = tmp_path_factory.mktemp("hostile")
    work = directory / "work"
    work.mkdir()
    said = {}

    def answer(body, authorization):
        number = len(said)
        text = said_to(body["messages"][-1]["content"])
        said[number] = text
        if number % 5 == 0:
            text = authorization.removeprefix("Bearer ") + text
        half = HALF_CHARACTERS[number % 3] if number % 9 == 0 else None
        return 200, completion(text, half)

    patch = pytest.MonkeyPatch()
    patch.chdir(work)
    patch.setenv("HOME", str(directory / "home"))
    (directory / "home").mkdir()
    rows = table_rows()
    (work / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, secret in SECRETS.items():
        patch.setenv(name, secret)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            with answering(answer) as url:
                extract(url)
            train_evaluate_and_export()
        yield directory, rows, printed.getvalue()
    finally:
        patch.undo()


def extract(url):
    columns = [f"--{name}_column={column}" for name, column in COLUMNS.items()]
    table = ["--dataset", "mine", "--input_file", "table.jsonl", *columns]
    teacher = ["--teacher", "endpoint", "--base_url", url, "--model", "m", "--keep", "legal"]
    teacher += ["--name", "m\x1b[2J\u202e"]
    assert main(["extract", *table, *teacher, "--output_dir", "out/records"]) == 0


def train_evaluate_and_export():
    run = ["--run_dir", "out/run"]
    gin = [part for binding in GIN for part in ("--gin", binding)]
    assert main(["train", "runs/step_by_step.gin", "settings/facts.gin", *run, *gin]) == 0
    assert main(["evaluate", *run]) == 0
    assert main(["export", "--student", "out/run", "--output_dir", "out/student"]) == 0


def test_records_hold_what_the_table_and_the_teacher_said(job):
    directory, rows, _ = job
    examples = list(read_examples(directory / "work/out/records/records.jsonl"))
    assert [(e.id, e.input, e.label, e.split) for e in examples] == [
        (row["id"], row["q"], row["a"], row["part"]) for row in rows
    ]
    with CompletionStore(directory / "work/out/records") as store:
        texts = {answer.text for answer in store.answers.values()}
    assert len(texts) > len(rows) * 0.8
    taught = [e for e in examples if e.rationale]
    assert len(taught) > len(rows) * 0.5
    said = " ".join(" ".join(text.split()) for text in texts)
    assert all(e.rationale[:500] in said.replace("`", "") for e in taught if "**" not in e.input)


def test_predictions_hold_the_problems_as_they_were(job):
    directory, rows, _ = job
    found = list(read_predictions(directory / "work/out/run/evaluations/2/predictions.jsonl"))
    expected = {row["id"]: (row["q"], row["a"]) for row in rows if row["part"] != "train"}
    assert {p.id: (p.input, p.label) for p in found} == expected


def test_nothing_was_obeyed(job):
    """No file but those of the job, and none named after a text."""
    directory, _, printed = job
    assert {path.name for path in directory.iterdir()} == {"work", "home"}
    assert {path.name for path in (directory / "work").iterdir()} == {"table.jsonl", "out"}
    assert not Path("/tmp", SPRUNG).exists()
    assert all(char.isprintable() or char in "\n\r\t" for char in printed)  # bars return
    for path in directory.rglob("*"):
        assert SPRUNG not in path.name and re.fullmatch(r"[\w.@=,+-]+", path.name), path


def test_no_secret_was_written(job):
    directory, _, printed = job
    assert "***" in (directory / "work/out/records/completions.jsonl").read_text(encoding="utf-8")
    assert_no_secret(directory, printed)


def test_predict_answers_each_line_and_shows_no_control_characters(job, capsys, monkeypatch):
    directory, rows, _ = job
    monkeypatch.chdir(directory / "work")
    inputs = [row["q"] for row in rows if len(row["q"]) < 1000]
    (directory / "inputs.jsonl").write_text(
        "".join(f"{json.dumps({'input': x})}\n" for x in inputs)
    )
    predict = ["predict", "--student", "out/student", str(directory / "inputs.jsonl")]
    predict += ["--max_label_length", "4"]
    assert main(predict) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]
    assert [row["input"] for row in shown] == inputs
    assert main([*predict, "--format", "text"]) == 0
    out = capsys.readouterr().out
    assert all(char.isprintable() or char == "\n" for char in out)
    assert len(re.findall("^input  ", out, re.M)) == len(inputs)  # no text forges a line
    (directory / "inputs.jsonl").unlink()


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_name_that_is_no_name_is_refused(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("q\nwhy\nhow\n")
    table = ["--input_file", "t.csv", "--input_column", "q", "--output_dir", "out"]
    try:
        assert main(["extract", f"--dataset={name}", *table]) == 2
    except SystemExit as exit:  # an argument that is no text
        assert exit.code == 2
    error = capsys.readouterr().err
    assert all(char.isprintable() or char == "\n" for char in error)
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_of_another_encoding_is_shown_escapes(encoding, tmp_path):
    args = ["extract", "--dataset", "facts", "--teacher", "scripted", "--output_dir", "☃"]
    sizes = ["--train", "5", "--validation", "2", "--test", "2"]
    found = subprocess.run(
        [sys.executable, "-m", "dslt.main", *args, *sizes],
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=100,
    )
    assert found.returncode == 0, found.stderr
    assert b"records: \\u2603/records.jsonl" in found.stdout
