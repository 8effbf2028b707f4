"""How `dslt predict` and `dslt evaluate` answer: by each strategy, and from a set of labels."""

import json
import shutil
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from dslt.commands.students import make_answer_sets
from dslt.errors import InputError
from dslt.evaluate import EvalConfig
from dslt.main import main
from dslt.records import read_predictions
from dslt.workdir import RunDir, read_json_rows


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
