"""The command itself: how it starts, what it imports, and that a mistake is one message."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import train_args

from dslt.main import main
from dslt.workdir import RunDir


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
