"""A slice that nobody uses deletes itself (launch/tpu_idle.sh); one in use stays."""

import os
import subprocess
import time

from tpu_world import ROOT, write_script


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
