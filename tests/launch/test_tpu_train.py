"""launch/tpu.sh with the real `dslt`, which trains in two processes."""

import json
import os
import shutil
import socket

import pytest
from tpu_world import ROOT, World, commit_all, git

from dslt.main import main
from dslt.workdir import RunDir, read_json_rows


@pytest.mark.slow
def test_two_workers_train_together(tmp_path):
    world = World(tmp_path)
    for name in ("dslt", "gin"):
        shutil.copytree(
            ROOT / name, world.repository / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "setup.py", world.repository)
    commit_all(world.repository)
    world.make_slice("v4-16")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    one_device = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    environment = {"JAX_COORDINATOR_ADDRESS": address, "XLA_FLAGS": one_device}
    environment["DSLT_TPU_POLL_SECS"] = "1"
    records = world.shared / "records"
    sizes = ["--train", "40", "--validation", "2", "--test", "2"]
    extract = ["extract", "--dataset", "facts", "--teacher", "scripted", *sizes]
    assert main([*extract, "--output_dir", str(records)]) == 0
    overrides = (
        "train.TrainConfig.num_steps = 2",
        "train.TrainConfig.log_every_steps = 1",
        "pipeline.DataConfig.batch_examples = 4",
        "t5.T5Config.d_model = 16",
        "t5.T5Config.num_layers = 1",
        "t5.T5Config.num_decoder_layers = 1",
        f"pipeline.DataConfig.records = ('{records / 'records.jsonl'}',)",
    )
    gin = [word for override in overrides for word in ("--gin", override)]
    command = ["train", "runs/step_by_step.gin", "settings/facts.gin", *gin]
    run = RunDir(world.shared / "run")
    result = world.tpu("run", "--", *command, "--run_dir", str(run.path), **environment)
    assert result.status == 0, result.err
    assert "devices     2 x cpu" in result.out
    assert run.state() == "finished"
    assert [row["step"] for row in read_json_rows(run.metrics)] == [1, 2]
    commit = git(world.repository, "rev-parse", "--short", "HEAD")
    assert json.loads(run.info.read_text())["commit"] == commit
