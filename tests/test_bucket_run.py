"""A run in a bucket goes on, is judged and is fetched on other machines, by the command line."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from small_run import final_params, train_args

from dslt import mirror
from dslt.main import main
from dslt.mirror import RunBucket
from dslt.workdir import RunDir, read_json_rows

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
