"""The whole job with a URL as --run_dir: on a directory as a store, and on a real S3 server.

The S3 server is moto's, on loopback, in a process of its own; where moto or s3fs is not installed
(pip install 's3fs' 'moto[server]') its test is skipped. What can fail on the way is in
tests/test_mirror.py.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dslt import mirror
from dslt.checkpoint.digests import named_leaves
from dslt.main import main
from dslt.mirror import Bucket
from dslt.workdir import RunDir, read_json_rows

pytest.importorskip("fsspec", reason="fsspec is not installed (extra `remote`)")

ROOT = Path(__file__).parents[2]
SMALL = (
    "t5.T5Config.d_model = 16",
    "t5.T5Config.d_kv = 8",
    "t5.T5Config.d_ff = 32",
    "t5.T5Config.num_heads = 2",
    "t5.T5Config.dropout_rate = 0.2",
    "pipeline.DataConfig.batch_examples = 8",
    "train.TrainConfig.num_steps = 6",
    "train.TrainConfig.save_every_steps = 2",
    "train.TrainConfig.keep_checkpoints = 2",
    "train.TrainConfig.log_every_steps = 1",
    "evaluate.EvalConfig.max_label_length = 8",
    "evaluate.EvalConfig.poll_secs = 0.1",
)
IN_HASTE = """
import os, signal, sys
from dslt import main, mirror
mirror.SYNC_SECS = 0.1
sys.exit(main.main(sys.argv[1:]))
"""
KILLED = IN_HASTE.replace(
    "sys.exit",
    """
write = mirror.Bucket.write
def write_and_die(self, name, content):
    write(self, name, content)
    if name.endswith(mirror.MARKER):
        os.kill(os.getpid(), signal.SIGKILL)
mirror.Bucket.write = write_and_die
sys.exit""",
)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    directory = tmp_path_factory.mktemp("records")
    sizes = ["--train", "60", "--validation", "4", "--test", "4"]
    args = ["--dataset", "facts", "--teacher", "scripted", *sizes]
    assert main(["extract", *args, "--output_dir", str(directory)]) == 0
    return directory / "records.jsonl"


def train_args(records, run_dir, *overrides):
    bindings = (f"pipeline.DataConfig.records = ({str(records)!r},)", *SMALL, *overrides)
    gin = [part for binding in bindings for part in ("--gin", binding)]
    return ["train", "runs/step_by_step.gin", "settings/facts.gin", "--run_dir", str(run_dir), *gin]


@pytest.fixture(scope="module")
def undisturbed(records, tmp_path_factory):
    """A run in a plain directory."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    assert main(train_args(records, directory)) == 0
    return RunDir(directory)


@pytest.fixture(params=["directory", "s3"])
def url(request, tmp_path, monkeypatch):
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


def start(machine: Path, *args, code: str = IN_HASTE) -> subprocess.Popen:
    """The command on a machine of its own, as far as files tell."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    env["DSLT_MIRROR_DIR"] = str(machine)
    command = [sys.executable, "-c", code, *args]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def params(run: RunDir, step: int) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(run.checkpoints / str(step) / "params")
    return {name: np.asarray(leaf) for name, leaf in named_leaves(tree)}


def test_a_killed_run_goes_on_on_another_machine_and_a_third_one_follows(
    url, records, undisturbed, tmp_path, monkeypatch, capsys
):
    """SIGKILL as soon as one checkpoint is whole in the bucket; the end is that of the undisturbed
    run, to the bit. The evaluator was there before the training, and judges its last checkpoint."""
    evaluator = start(tmp_path / "evaluator", "evaluate", "--run_dir", url, "--follow")
    first = start(tmp_path / "first", *train_args(records, url), code=KILLED)
    first.communicate(timeout=120)
    assert first.returncode == -signal.SIGKILL
    bucket = Bucket(url)
    reached = max(bucket.checkpoints("checkpoints", bucket.find()))

    monkeypatch.setenv("DSLT_MIRROR_DIR", str(tmp_path / "second"))
    monkeypatch.setattr(mirror, "SYNC_SECS", 0.1)
    assert main(train_args(records, url)) == 0
    said = capsys.readouterr().out
    assert f"after step {reached}." in said and f"all is in {url}" in said
    (path,) = (tmp_path / "second").glob("*/train-*/run")
    found, expected = params(RunDir(path), 6), params(undisturbed, 6)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert [row["step"] for row in read_json_rows(RunDir(path).metrics)] == list(range(1, 7))
    assert sorted(bucket.checkpoints("checkpoints", bucket.find())) == [4, 6]

    output = evaluator.communicate(timeout=60)[0]
    assert evaluator.returncode == 0 and "step 6: test" in output, output

    monkeypatch.setenv("DSLT_MIRROR_DIR", str(tmp_path / "third"))
    (tmp_path / "inputs.txt").write_text("premise: ann has a red ball .\n")
    assert main(["predict", "--student", url, str(tmp_path / "inputs.txt")]) == 0
    assert '"prediction"' in capsys.readouterr().out
    assert (
        main(
            [
                "export",
                "--student",
                f"{url}/checkpoints/6",
                "--output_dir",
                str(tmp_path / "student"),
            ]
        )
        == 0
    )
    fetched = {path.name for path in (tmp_path / "third").rglob("*")}
    assert "params" in fetched and "opt_state" not in fetched


@pytest.mark.parametrize("command", [["train", "runs/step_by_step.gin"], ["evaluate"]])
def test_several_processes_do_not_share_a_url(command, capsys):
    args = [*command, "--run_dir", "gs://key:secret@bucket/run", "--num_processes", "2"]
    assert main(args) == 2
    said = capsys.readouterr().err
    assert "gs://***@bucket/run: several processes share one directory; mount the bucket" in said
    assert "secret" not in said
