"""What launch/tpu.sh would do: --dry_run prints it, in commands that gcloud knows; --help."""

import json
import os
import re
import shlex
import shutil
import subprocess

import pytest
from tpu_world import ROOT, WHERE, git

from dslt.core.topology import cloud_name, parse_topology

SLICES = sorted((ROOT / "gin" / "slices").glob("*.gin"))


def commands_of(result, world):
    """The commands that --dry_run printed, without what varies."""
    scratch = re.compile(r"\S+/dslt.bundle")
    text = scratch.sub("SCRATCH/dslt.bundle", result.out).replace(str(world.path), "WORLD")
    return text.splitlines()


LOOK = [
    f'gcloud compute tpus tpu-vm describe paper {WHERE} --format=\'value[separator="|"]'
    "(state,acceleratorType.basename(),networkEndpoints.len())'",
    f"gcloud compute tpus queued-resources describe paper {WHERE} --format='value(state.state)'",
]
METADATA = "dslt-name=paper,dslt-zone=us-west4-a,dslt-project=my-project,dslt-idle-minutes=60"
STARTUP = "--metadata-from-file=startup-script=WORLD/repository/launch/tpu_idle.sh"
ALIVE = "--ssh-flag='-o ServerAliveInterval=20'"
SSH = f"gcloud compute tpus tpu-vm ssh paper {WHERE} --worker=%s {ALIVE}"
DRY_RUNS = {
    "create --slice slices/small.gin": [
        *LOOK,
        f"gcloud compute tpus tpu-vm create paper {WHERE} --version=v2-alpha-tpuv5-lite "
        f"--accelerator-type=v5litepod-16 {STARTUP} --metadata={METADATA}",
    ],
    "create --type v4-32 --spot --idle_minutes 5 --create_flag=--network=mine": [
        *LOOK,
        f"gcloud compute tpus tpu-vm create paper {WHERE} --version=tpu-ubuntu2204-base "
        f"--accelerator-type=v4-32 --spot --network=mine {STARTUP} "
        f"--metadata={METADATA.replace('60', '5')}",
    ],
    "create --type=v6e-8 --queued --version v": [
        *LOOK,
        f"gcloud compute tpus queued-resources create paper {WHERE} --node-id=paper "
        f"--runtime-version=v --accelerator-type=v6e-8 {STARTUP} "
        f"--metadata={METADATA},dslt-queued=1",
    ],
    "run --fetch out --delete -- dslt train slices/small.gin --run_dir=SHARED/x --gin 'a.b = 1'": [
        "git -C WORLD/repository bundle create --quiet SCRATCH/dslt.bundle HEAD",
        "gcloud storage buckets describe gs://my-bucket --raw "
        "--format='value(hierarchicalNamespace.enabled)'",
        *LOOK,
        "gcloud compute tpus tpu-vm scp WORLD/repository/launch/tpu_worker.sh SCRATCH/dslt.bundle "
        f"paper: --worker=all {WHERE}",
        f"{SSH % 'all'} --command='bash tpu_worker.sh install dslt.bundle COMMIT my-bucket'",
        f"{SSH % 'all'} --command='bash tpu_worker.sh start train slices/small.gin "
        "--run_dir=WORLD/shared/x --gin a.b\\ =\\ 1 --distributed'",
        f"{SSH % 0} --command='bash tpu_worker.sh poll 0'",
        f"{SSH % 'all'} --command='bash tpu_worker.sh state'",
        "mkdir -p out",
        "gcloud storage cp gs://my-bucket/x out --recursive",
        *LOOK,
        f"gcloud compute tpus tpu-vm delete paper {WHERE} --quiet",
    ],
    "run --repo https://h/r --commit a --ssh_flag=--internal-ip -- export --output_dir SHARED/x": [
        "gcloud storage buckets describe gs://my-bucket --raw "
        "--format='value(hierarchicalNamespace.enabled)'",
        *LOOK,
        "gcloud compute tpus tpu-vm scp WORLD/repository/launch/tpu_worker.sh paper: --worker=all "
        f"{WHERE} --internal-ip",
        f"{SSH % 'all'} --internal-ip --command='bash tpu_worker.sh install https://h/r a "
        "my-bucket'",
        f"{SSH % 'all'} --internal-ip --command='JAX_PLATFORMS=cpu bash tpu_worker.sh start export "
        "--output_dir WORLD/shared/x'",
        f"{SSH % 0} --internal-ip --command='bash tpu_worker.sh poll 0'",
        f"{SSH % 'all'} --internal-ip --command='bash tpu_worker.sh state'",
    ],
    "status": [*LOOK, f"{SSH % 'all'} --command='bash tpu_worker.sh state'"],
    "logs --worker 3": [*LOOK, f"{SSH % 3} --command='bash tpu_worker.sh poll 0'"],
    "logs --worker all": [*LOOK, f"{SSH % 'all'} --command='bash tpu_worker.sh tail 20'"],
    "ssh --worker=1": [*LOOK, SSH % 1],
    "ssh -- df -h": [*LOOK, f"{SSH % 0} --command='df -h'"],
    "stop": [*LOOK, f"{SSH % 'all'} --command='bash tpu_worker.sh stop'"],
    "delete": [*LOOK, f"gcloud compute tpus tpu-vm delete paper {WHERE} --quiet"],
    "delete --queued": [
        *LOOK,
        f"gcloud compute tpus queued-resources delete paper {WHERE} --force --quiet",
    ],
}


@pytest.mark.parametrize("line", DRY_RUNS)
def test_a_dry_run_prints_every_command_and_runs_none(world, line):
    words = shlex.split(line.replace("SHARED", str(world.shared)))
    result = world.tpu(words[0], "--dry_run", *words[1:])
    commit = git(world.repository, "rev-parse", "HEAD")
    expected = [command.replace("COMMIT", commit) for command in DRY_RUNS[line]]
    assert commands_of(result, world) == expected, result.err
    assert result.status == 0 and world.calls() == []


@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")
def test_gcloud_knows_the_commands_and_their_flags(tmp_path):
    """gcloud's own linter, which asks nobody."""
    lines = [line for lines in DRY_RUNS.values() for line in lines if line.startswith("gcloud")]
    shapes = {re.sub(r"=('[^']*'|\S+)", "", line): line for line in lines}  # one of each, for time
    known = [{"command_string": line} for line in shapes.values()]
    commands = tmp_path / "commands"
    commands.write_text(json.dumps(known))
    lint = ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={commands}"]
    quiet = {"CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_CHECK_GCE_METADATA": "0"}
    result = subprocess.run(lint, env=os.environ | quiet, capture_output=True, text=True)
    rows = json.loads(result.stdout)
    assert len(rows) == len(known) > 10
    for row in rows:
        assert row["success"], (row["command_string"], row["error_message"])


@pytest.mark.parametrize("path", SLICES, ids=lambda path: path.stem)
def test_a_slice_file_names_its_slice(world, path):
    topology = parse_topology("v5e:" + path.stem.rpartition("_v5e_")[2])
    shutil.copy(path, world.repository / "gin" / "slices")
    result = world.tpu("create", "--dry_run", "--slice", f"slices/{path.name}")
    assert f"--accelerator-type={cloud_name(topology)} " in result.out


def test_help_is_the_header(world):
    result = world.tpu("--help")
    assert result.status == 0
    assert result.out.startswith("dslt on a Cloud TPU slice") and "--dry_run" in result.out
    assert "set -euo" not in result.out
