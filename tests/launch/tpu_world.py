"""launch/tpu.sh in a world of its own: a stand-in gcloud (stand_in.py), directories as workers.

The code that it copies is a small git repository, whose `dslt` runs a program of the test;
test_tpu_train.py copies the real one.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[2]
TRAIN = ["train", "runs/step_by_step.gin", "slices/small.gin"]
WHERE = "--zone=us-west4-a --project=my-project"
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
