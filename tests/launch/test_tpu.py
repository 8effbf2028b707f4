"""launch/tpu.sh against a stand-in gcloud (stand_in.py), whose workers are directories here.

The code that it copies is a small git repository of its own, whose `dslt` runs a program of the
test; one test copies the real one, and trains in two processes.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dslt.core.topology import cloud_name, parse_topology
from dslt.main import INTERRUPTED, main
from dslt.workdir import RunDir, read_json_rows

ROOT = Path(__file__).parents[2]
SLICES = sorted((ROOT / "gin" / "slices").glob("*.gin"))
TRAIN = ["train", "runs/step_by_step.gin", "slices/small.gin"]
# What `dslt` is on these workers: the test's program, which is told its number and its arguments.
MAIN = "import os\nexec(open(os.environ['WORLD'] + '/program.py').read())\n"
PYTHON = f"""#!/usr/bin/env bash
# A worker's python3: makes an environment without pip, in which packages are only noted.
if [[ "$1 $2" == "-m venv" ]]; then
  mkdir -p "$3/bin"
  echo "PATH=$PWD/$3/bin:\\$PATH" >"$3/bin/activate"
  cp "$0" "$3/bin/python" && cp "$0" "$3/bin/pip" && exit
fi
if [[ "$1 $2" == "-m pip" ]]; then
  echo "$*" >>"$WORLD/pip.$WORKER"
  if [[ -e "$WORLD/no_pip.$WORKER" ]]; then echo "no network on worker $WORKER" >&2 && exit 1; fi
  exit
fi
exec {sys.executable} "$@"
"""


def write_script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def git(directory, *words):
    settings = ["-c", "user.name=x", "-c", "user.email=x", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(directory), *settings, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit_all(repository):
    git(repository, "init", "--quiet")
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message", "x")


class World:
    """A repository with launch/, a gcloud, and what lies behind it."""

    def __init__(self, path, workers=2):
        self.path = path
        self.repository = path / "repository"
        self.shared = path / "shared"
        self.shared.mkdir()
        (path / "num_workers").write_text(str(workers))
        shutil.copytree(ROOT / "launch", self.repository / "launch")
        write_script(
            path / "bin" / "gcloud",
            f'#!/bin/sh\nexec {sys.executable} -S -E {Path(__file__).parent}/stand_in.py "$@"\n',
        )
        write_script(path / "worker_bin" / "python3", PYTHON)
        write_script(path / "worker_bin" / "mountpoint", "#!/bin/sh\nexit 0\n")

    def add_small_dslt(self):
        package = self.repository / "dslt"
        package.mkdir()
        for name, text in {"__init__": "", "config": "", "main": MAIN}.items():
            (package / f"{name}.py").write_text(text)
        (self.repository / "setup.py").write_text("# the packages\n")
        slices = self.repository / "gin" / "slices"
        slices.mkdir(parents=True)
        (slices / "small.gin").write_text("# T5 on v5e:4x4 (v5litepod-16), planned.\n")
        commit_all(self.repository)

    def program(self, text):
        """What every worker's `dslt` does; `worker` and `arguments` are there."""
        head = "import os, sys, time\nworker, arguments = int(os.environ['WORKER']), sys.argv[1:]\n"
        (self.path / "program.py").write_text(head + text)

    def faults(self, *faults):
        (self.path / "faults.json").write_text(json.dumps(faults))

    def environment(self):
        return os.environ | {
            "WORLD": str(self.path),
            "PATH": f"{self.path / 'bin'}:{os.environ['PATH']}",
            "DSLT_SHARED": str(self.shared),
            "DSLT_TPU_POLL_SECS": "0.1",
            "DSLT_HEARTBEAT_SECS": "0.1",
            "DSLT_TPU_NAME": "paper",
            "DSLT_TPU_ZONE": "us-west4-a",
            "DSLT_TPU_PROJECT": "my-project",
            "DSLT_TPU_BUCKET": "my-bucket",
        }

    def begin(self, *words, **environment):
        return subprocess.Popen(
            ["bash", str(self.repository / "launch" / "tpu.sh"), *words],
            env=self.environment() | environment,
            cwd=self.path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, process):
        out, err = process.communicate(timeout=120)
        return SimpleNamespace(status=process.returncode, out=out, err=err)

    def tpu(self, *words, **environment):
        return self.end(self.begin(*words, **environment))

    def run(self, *flags, command=TRAIN):
        run_dir = ["--run_dir", str(self.shared / "run")]
        return self.tpu("run", *flags, "--", *command, *run_dir)

    def make_slice(self, kind="v5litepod-16"):
        workers = int((self.path / "num_workers").read_text())
        found = {"state": "READY", "type": kind, "workers": workers}
        (self.path / "vm.json").write_text(json.dumps(found))

    def calls(self, pattern="."):
        path = self.path / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        calls = [" ".join(json.loads(line)) for line in lines]
        return [call for call in calls if re.search(pattern, call)]

    def installs(self, worker):
        path = self.path / f"pip.{worker}"
        return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    world.add_small_dslt()
    return world


@pytest.fixture
def slice_of_two(world):
    world.make_slice()
    return world


# --- what would be done


def commands_of(result, world):
    """The commands that --dry_run printed, without what varies."""
    scratch = re.compile(r"\S+/dslt.bundle")
    text = scratch.sub("SCRATCH/dslt.bundle", result.out).replace(str(world.path), "WORLD")
    return text.splitlines()


WHERE = "--zone=us-west4-a --project=my-project"
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


# --- create and delete


def test_create_makes_a_slice_once(world):
    assert world.tpu("create", "--type", "v5litepod-16").status == 0
    again = world.tpu("create", "--type", "v5litepod-16")
    assert again.status == 2
    assert "found paper in us-west4-a: READY; expected none" in again.err
    assert "delete it: bash launch/tpu.sh delete" in again.err
    assert len(world.calls("tpu-vm create")) == 1


def test_create_waits_in_the_queue(world):
    world.faults({"on": "tpu-vm describe", "skip": 3, "vm": "READY", "queue": "ACTIVE"})
    result = world.tpu("create", "--type", "v5litepod-16", "--queued")
    assert result.status == 0 and "paper is READY: 2 workers" in result.err
    assert len(world.calls("tpu-vm describe")) == 4
    (world.path / "vm.json").unlink()
    again = world.tpu("create", "--type", "v5litepod-16", "--queued")
    assert again.status == 2 and "found paper in us-west4-a: not there, ACTIVE in" in again.err
    assert len(world.calls("queued-resources create")) == 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            {"on": "queued-resources describe", "skip": 2, "queue": "FAILED"},
            "is FAILED; expected",
        ),
        ({"on": "queued-resources create", "status": 1}, "gcloud did not take the request"),
        ({"on": "nothing"}, "CREATING, WAITING_FOR_RESOURCES in the queue after 0 minutes"),
    ],
)
def test_a_request_that_comes_to_nothing_says_so(world, fault, message):
    world.faults(fault)
    minutes = "0" if fault["on"] == "nothing" else "1"
    result = world.tpu("create", "--type", "v4-8", "--queued", "--wait_minutes", minutes)
    assert result.status == 2 and message in result.err


def test_no_capacity_is_said_with_what_next(world):
    stderr = "ERROR: (gcloud) There is no more capacity in the zone"
    world.faults({"on": "tpu-vm create", "status": 1, "stderr": stderr})
    result = world.tpu("create", "--type", "v4-8", "--spot")
    assert result.status == 2 and stderr in result.err and "--queued, or another" in result.err


def test_what_gcloud_cannot_say_is_not_taken_for_nothing_there(world):
    world.faults({"on": "describe", "status": 1, "stderr": "ERROR: not logged in"})
    result = world.tpu("create", "--type", "v4-8")
    assert result.status == 2 and "not logged in" in result.err and not world.calls("create")


def test_delete_takes_the_queued_resource_with_it(world):
    (world.path / "queue").write_text("ACTIVE")
    world.make_slice()
    assert world.tpu("delete").status == 0
    (call,) = world.calls("delete")
    assert call == f"compute tpus queued-resources delete paper {WHERE} --force --quiet"
    result = world.tpu("delete")
    assert result.status == 0 and "nothing to delete" in result.err


# --- run


def test_the_same_command_runs_on_every_worker(slice_of_two):
    world = slice_of_two
    world.program("print('hear', worker, arguments)\ntime.sleep(0.3)\nprint('done', worker)")
    command = [*TRAIN, "--gin", "train.TrainConfig.name = 'it is  two'"]
    result = world.run(command=command)
    assert result.status == 0, result.err
    expected = [*command, "--run_dir", str(world.shared / "run"), "--distributed"]
    assert result.out == f"hear 0 {expected}\ndone 0\n"
    log = world.path / "workers" / "1" / "dslt" / "job" / "log"
    assert log.read_text() == f"hear 1 {expected}\ndone 1\n"
    head = git(world.repository, "rev-parse", "HEAD")
    for worker in "01":
        assert git(world.path / "workers" / worker / "dslt" / "code", "rev-parse", "HEAD") == head


def test_what_is_installed_is_not_installed_again(slice_of_two):
    world = slice_of_two
    world.program("print('first')")
    world.run()
    world.program("print('second')")
    assert world.run().out == "second\n"
    assert [world.installs(worker) for worker in (0, 1)] == [1, 1]
    (world.repository / "setup.py").write_text("# other packages\n")
    git(world.repository, "commit", "--all", "--message", "x")
    assert world.run().status == 0
    assert [world.installs(worker) for worker in (0, 1)] == [2, 2]


def test_a_worker_on_which_the_installation_fails_is_named_and_goes_on(slice_of_two):
    world = slice_of_two
    world.program("print('it runs')")
    (world.path / "no_pip.1").touch()
    result = world.run()
    assert result.status == 2 and "the installation failed on worker 1 of 2;" in result.err
    assert "worker 1: no network on worker 1" in result.err and "it runs" not in result.out
    (world.path / "no_pip.1").unlink()
    assert world.run().out == "it runs\n"
    assert [world.installs(worker) for worker in (0, 1)] == [1, 2]


def test_a_half_installed_worker_is_installed_again(slice_of_two):
    """Killed at the worst times: in a checkout, and in a pip whose environment looks whole."""
    world = slice_of_two
    world.program("print('it runs')")
    world.run()
    code = world.path / "workers" / "1" / "dslt" / "code"
    (code / ".git" / "index.lock").touch()
    (code / "dslt" / "config.py").unlink()
    write_script(code / ".venv" / "bin" / "python", "#!/bin/sh\nexit 1\n")
    result = world.run()
    assert result.status == 0 and result.out == "it runs\n"
    assert [world.installs(worker) for worker in (0, 1)] == [1, 2]


def test_the_worker_that_failed_first_is_shown(tmp_path):
    world = World(tmp_path, workers=3)
    world.add_small_dslt()
    world.make_slice()
    world.program(
        "time.sleep(0.2 if worker == 1 else 0.6)\n"
        "print('worker 1 has no memory left' if worker == 1 else 'another failed')\n"
        "sys.exit(7 if worker == 1 else 1)"
    )
    result = world.run()
    assert result.status == 7 and result.out == "another failed\n"
    assert "worker 1 ended with status 7, before any other of the 3" in result.err
    assert "worker 1 has no memory left" in result.err.partition("its last lines")[2]
    assert "dslt ended with status 7; the slice paper stays" in result.err


def test_a_worker_that_was_killed_is_shown(slice_of_two):
    world = slice_of_two
    world.program(
        "import signal\n"
        "print('going on')\n"
        "if worker == 1: os.kill(os.getppid(), signal.SIGKILL); os._exit(1)\n"
        "time.sleep(0.5); sys.exit(1)"
    )
    result = world.run()
    assert result.status == 1 and "worker 1 was killed, or rebooted" in result.err


def test_a_worker_that_never_comes_up_is_named(slice_of_two):
    world = slice_of_two
    world.faults({"on": "scp.*--worker=1", "times": -1, "status": 255, "stderr": "timed out"})
    result = world.run("--wait_minutes", "0")
    assert result.status == 2 and "worker 1: timed out" in result.err
    assert "the code could not be copied in 0 minutes on worker 1 of 2" in result.err
    assert "never comes up needs a new slice" in result.err


def test_a_worker_that_comes_up_late_is_waited_for(slice_of_two):
    world = slice_of_two
    world.program("print('it runs')")
    world.faults({"on": "scp.*--worker=1", "times": 3, "status": 255})
    assert world.run().out == "it runs\n"
    first = world.calls("scp")[0]
    assert "--worker=0" in first  # alone, so that gcloud adds the ssh key once


def test_a_dropped_connection_loses_and_repeats_nothing(slice_of_two):
    world = slice_of_two
    world.program("for i in range(20): print('line', i, flush=True); time.sleep(0.05)")
    world.faults(
        {"on": "poll", "skip": 1, "status": 255},
        {"on": "describe", "skip": 3, "times": 2, "status": 1, "stderr": "no network"},
        {"on": "poll", "skip": 2, "status": 255},
    )
    result = world.run()
    assert result.status == 0
    assert result.out.splitlines() == [f"line {i}" for i in range(20)]


RESUMING = """
path = os.path.join(os.environ["DSLT_SHARED"], "step")
if not os.path.exists(path):
    print("train from nothing", flush=True)
    time.sleep(0.2)
    open(path, "w").close()
    time.sleep(60)
print("resume and finish")
"""
PREEMPTION = {"on": "poll", "skip": 8, "preempt": True, "status": 1}


def test_a_preempted_slice_is_made_again_and_the_run_resumed(world):
    world.program(RESUMING)
    world.faults(PREEMPTION)
    flags = ("--recreate", "2", "--spot", "--delete", "--fetch", "here")
    result = world.run(*flags)
    assert result.status == 0, result.err
    assert result.out.startswith("train from nothing\nresume and finish\n")
    assert "copied gs://my-bucket/run to here" in result.out
    actions = [call.split()[3] for call in world.calls("tpu-vm (create|delete)")]
    assert actions == ["create", "delete", "create", "delete"]
    assert all("--spot" in call for call in world.calls("tpu-vm create"))
    assert not (world.path / "vm.json").exists()


def test_a_run_waits_for_a_slice_that_stands_in_line(world):
    """It is not asked for again, which would lose its place."""
    world.program("print('it runs')")
    world.faults({"on": "tpu-vm describe", "skip": 3, "vm": "READY", "queue": "ACTIVE"})
    world.tpu("create", "--type", "v5litepod-16", "--queued", "--wait_minutes", "0")
    assert world.run("--recreate", "1").out == "it runs\n"
    assert len(world.calls("queued-resources create")) == 1 and not world.calls("delete")


def test_a_preemption_too_many_says_what_next(slice_of_two):
    world = slice_of_two
    world.program(RESUMING)
    world.faults(PREEMPTION)
    result = world.run()
    assert result.status == 2
    assert f"the slice was preempted; what was saved is in {world.shared}/run." in result.err
    assert not world.calls("create|delete")


def test_a_preemption_during_the_installation_is_one_too(world):
    world.program("print('it runs')")
    fault = {"on": "install", "preempt": True, "status": 1}
    world.make_slice()
    world.faults(fault)
    assert world.run("--recreate", "1").out == "it runs\n"


def test_stop_lets_every_worker_save(slice_of_two):
    world = slice_of_two
    world.program(
        "import signal\n"
        "def save(*_): print('saved', flush=True); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "print('training', flush=True)\n"
        "time.sleep(60)"
    )
    running = world.begin("run", "--", *TRAIN, "--run_dir", str(world.shared / "run"))
    line = running.stdout.readline()
    status = world.tpu("status").out
    busy = world.run()
    stopped = world.tpu("stop")
    result = world.end(running)
    assert line == "training\n" and "worker 1: running" in status
    assert busy.status == 2 and "runs 'dslt train" in busy.err  # a second run does not disturb it
    assert stopped.status == 0 and "the slice stays, and is paid for" in stopped.err
    assert result.status == INTERRUPTED and result.out == "saved\n"
    assert re.search("worker 1: ended 130 ", world.tpu("status").out)


def test_other_commands_run_on_worker_0s_cpu(slice_of_two):
    world = slice_of_two
    world.program("print(worker, arguments, os.environ['JAX_PLATFORMS'])")
    command = ["extract", "--output_dir", str(world.shared / "records")]
    result = world.tpu("run", "--", *command, JAX_PLATFORMS="tpu")
    assert result.out == f"0 {command} cpu\n", result.err
    assert not (world.path / "workers" / "1" / "dslt" / "job").exists()


def test_a_sweep_runs_on_the_chips_of_one_worker_and_of_no_more(slice_of_two):
    world = slice_of_two
    world.program("import os; print(arguments[0], os.environ.get('JAX_PLATFORMS'))")
    command = ["sweep", "s.gin", "--output_dir", str(world.shared / "sweep")]
    refused = world.tpu("run", "--", *command, "--only", "a-run")
    assert refused.status == 2
    assert "the slice paper has several workers, and a sweep trains in one" in refused.err
    assert not world.calls("scp")
    assert world.tpu("run", "--", *command, "--list").out == "sweep cpu\n"
    (world.path / "num_workers").write_text("1")
    world.make_slice()
    found = world.tpu("run", "--", "dslt", *command, "--only", "a-run", JAX_PLATFORMS="tpu")
    assert found.out == "sweep tpu\n", found.err


def test_a_run_of_a_sweep_that_another_works_on_costs_no_slice(slice_of_two):
    """dslt ends with 75, which is no preemption."""
    world = slice_of_two
    world.program("sys.exit(75)")
    result = world.run("--recreate", "1")
    assert result.status == 1 and "ended with status 75" in result.err
    assert not world.calls("tpu-vm (create|delete)")


def test_logs_of_many_workers_are_told_apart(tmp_path):
    world = World(tmp_path, workers=40)  # more than are asked at once
    world.make_slice()
    for worker in range(40):
        home = tmp_path / "workers" / str(worker)
        (home / "dslt" / "job").mkdir(parents=True)
        shutil.copy(ROOT / "launch" / "tpu_worker.sh", home)
        lines = [f"line {i} of {worker}\n" for i in range(30)]
        (home / "dslt" / "job" / "log").write_text("".join(lines))
    result = world.tpu("logs", "--worker", "all")
    expected = [f"worker {w}: line {i} of {w}" for w in range(40) for i in range(10, 30)]
    assert result.status == 0 and result.out.splitlines() == expected


# --- what cannot be


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("launch", "found 'launch'; expected create, run, status"),
        ("status --nmae x", "found '--nmae'; expected a flag of --help"),
        ("status --name", "--name needs a value"),
        ("status --name=", "--name is missing; give it, or set DSLT_TPU_NAME"),
        ("status --wait_minutes soon", "--wait_minutes is 'soon'; expected a whole number"),
        ("create --idle_minutes 0", "--idle_minutes is 0; expected at least 1"),
        ("create", "found no accelerator type; give --slice slices/"),
        ("create --type tpu", "--type is 'tpu'; expected v4-N"),
        ("create --slice slices/none.gin", "there are: slices/small.gin"),
        ("create --slice slices/small.gin --type v4-8", "planned for v5litepod-16; expected the"),
        ("create --filestore x", "expected SERVER:/SHARE, such as"),
        ("create --bucket a/b", "--bucket is 'a/b'; expected a bucket's name alone"),
        ("run", "found no dslt command; expected it after --"),
        ("run -- train --run_dir runs/x", "the command writes to runs/x; expected a directory"),
        ("run -- train --run_dir gs://b/x", "found 'gs://b/x'; dslt reads and writes plain paths"),
        ("run --bucket= -- train --run_dir SHARED/x", "give the --bucket or the --filestore that"),
        ("run -- evaluate --run_dir SHARED/x --follow", "a chip serves one process"),
        ("run --fetch x -- bench", "--fetch: the command has no --run_dir"),
        ("run --recreate 1 -- bench", "--recreate needs to know what to make"),
        ("run --repo url -- bench", "--repo needs --commit"),
        ("run --type v5e-16 --recreate 1 -- sweep s", "v5e-16 has several workers, and a sweep"),
        ("run --commit 1234567 -- bench", "commit 1234567 is not in the history of"),
        ("run -- bench", "the slice paper in us-west4-a is not there; expected READY. Make it"),
        ("stop", "expected READY. Make it: bash launch/tpu.sh create"),
    ],
)
def test_a_mistake_is_named_before_anything_is_made(world, line, message):
    result = world.tpu(*shlex.split(line.replace("SHARED", str(world.shared))))
    assert result.status == 2 and message in result.err
    assert not world.calls("create|ssh|scp|delete")


def test_uncommitted_changes_are_not_run_unseen(slice_of_two):
    world = slice_of_two
    world.program("print('it runs')")
    (world.repository / "dslt" / "main.py").write_text("print('changed')")
    result = world.run()
    head = git(world.repository, "rev-parse", "--short", "HEAD")
    assert result.status == 2 and "found 1 uncommitted changes" in result.err
    assert f"run without them: --commit {head}" in result.err
    assert world.run("--commit", head).out == "it runs\n"


def test_a_bucket_that_renames_file_by_file_is_refused(slice_of_two):
    (slice_of_two.path / "hierarchical").write_text("")
    result = slice_of_two.run()
    assert result.status == 2
    assert "gs://my-bucket has no hierarchical namespace; expected one" in result.err
    assert "--location=us-west4 --project=my-project" in result.err


def test_another_slice_than_was_planned_for_is_refused(world):
    world.make_slice("v5litepod-8")
    result = world.run()
    assert result.status == 2
    assert "is a v5litepod-8, but slices/small.gin says v5litepod-16" in result.err


# --- a slice that nobody uses


def run_idle(tmp_path, worker="0", queued=False, age_minutes=10):
    """Runs tpu_idle.sh for a second; returns the gcloud calls it made."""
    tmp_path.mkdir(exist_ok=True)
    values = {"agent-worker-number": worker, "dslt-name": "paper", "dslt-zone": "us-west4-a"}
    values |= {"dslt-project": "my-project", "dslt-idle-minutes": "5"}
    values |= {"dslt-queued": "1"} if queued else {}
    cases = "\n".join(f"  */{name}) echo {value} ;;" for name, value in values.items())
    asked = f'case "${{@: -1}}" in\n{cases}\n*) exit 22;;\nesac\n'
    write_script(tmp_path / "bin" / "curl", f"#!/bin/bash\n{asked}")
    write_script(tmp_path / "bin" / "gcloud", f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\n')
    # The script notes the boot; `touch` is what makes it look long ago.
    write_script(
        tmp_path / "bin" / "touch",
        f'#!/bin/sh\nexec /usr/bin/touch -d "{age_minutes} minutes ago" "$@"\n',
    )
    (tmp_path / "pts").mkdir(exist_ok=True)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "DSLT_HEARTBEATS": str(tmp_path / "heartbeats"),
        "DSLT_TERMINALS": str(tmp_path / "pts"),
        "DSLT_IDLE_POLL_SECS": "0.1",
    }
    command = ["timeout", "1", "bash", str(ROOT / "launch" / "tpu_idle.sh")]
    subprocess.run(command, env=environment, capture_output=True, check=False)
    calls = tmp_path / "calls"
    return calls.read_text().splitlines() if calls.exists() else []


def test_an_idle_slice_deletes_itself_once(tmp_path):
    where = "paper --zone=us-west4-a --project=my-project --quiet"
    assert run_idle(tmp_path / "a") == [f"compute tpus tpu-vm delete {where} --async"]
    queued = run_idle(tmp_path / "b", queued=True)
    assert queued == [f"compute tpus queued-resources delete {where} --force --async"]


def test_a_slice_in_use_stays(tmp_path):
    assert run_idle(tmp_path / "booted", age_minutes=1) == []
    assert run_idle(tmp_path / "worker", worker="1") == []
    (tmp_path / "terminal" / "pts").mkdir(parents=True)
    (tmp_path / "terminal" / "pts" / "0").touch()  # somebody types there
    assert run_idle(tmp_path / "terminal") == []
    (tmp_path / "job" / "heartbeats").mkdir(parents=True)
    (tmp_path / "job" / "heartbeats" / "1000").touch()
    assert run_idle(tmp_path / "job") == []


def test_a_job_counts_as_use_no_longer_than_it_lives(slice_of_two):
    """Killed with the script that attends it, too: the slice would never be idle again."""
    world = slice_of_two
    (world.path / "heartbeats").mkdir()
    world.program("import signal\ntime.sleep(0.3)\nos.kill(os.getppid(), signal.SIGKILL)")
    before = time.time() - 1
    assert world.run().status == 1
    (heartbeat,) = (world.path / "heartbeats").iterdir()
    assert heartbeat.name == str(os.getuid()) and heartbeat.stat().st_mtime > before
    time.sleep(0.3)
    last = heartbeat.stat().st_mtime
    time.sleep(0.3)
    assert heartbeat.stat().st_mtime == last


# --- the real thing, but for the TPU


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
