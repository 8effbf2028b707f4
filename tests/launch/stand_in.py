"""A stand-in for gcloud: records its calls, keeps a slice in a directory, and does as it is told.

    WORLD/calls.jsonl     the arguments of each call
    WORLD/vm.json         the slice, if there is one: state, type, workers
    WORLD/queue           the state of the queued resource of its name, if there is one
    WORLD/faults.json     what is to happen: for the first `times` calls that match `on`, in order
    WORLD/workers/N/      the home of worker N: `ssh` runs its command there, `scp` copies there

A fault has `on` (a regular expression, searched in the call's words), `times`, and any of `status`
and `stderr` (the call fails so), `preempt` (the slice is lost first), `vm` and `queue` (their new
state, None for none).
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

WORLD = Path(os.environ["WORLD"])
NOT_FOUND = "ERROR: (gcloud) NOT_FOUND: Resource 'projects/p/nodes/n' was not found"


def main(words: list[str]) -> int:
    fault = note_call(words)
    if fault.get("preempt"):
        preempt()
    for name in ("vm", "queue"):
        if name in fault:
            set_state(name, fault[name])
    if "status" in fault:
        print(fault.get("stderr", "ERROR: (gcloud) told to fail"), file=sys.stderr)
        return fault["status"]
    flags = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
    plain = [word for word in words if not word.startswith("--")]
    if plain[:3] == ["storage", "buckets", "describe"]:
        print((WORLD / "hierarchical").read_text() if (WORLD / "hierarchical").exists() else "True")
        return 0
    if plain[:2] == ["storage", "cp"]:
        print(f"copied {plain[2]} to {plain[3]}")
        return 0
    assert plain[:2] == ["compute", "tpus"], words
    assert flags["zone"] == "us-west4-a" and flags["project"] == "my-project", words
    return COMMANDS[plain[2], plain[3]](plain[4:], flags)


def note_call(words: list[str]) -> dict:
    """Records a call; returns the fault that it meets, or {}."""
    with (WORLD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with (WORLD / "calls.jsonl").open("a") as calls:
            calls.write(json.dumps(words) + "\n")
        path = WORLD / "faults.json"
        faults = json.loads(path.read_text()) if path.exists() else []
        for fault in faults:
            if fault.get("times", 1) and re.search(fault["on"], " ".join(words)):
                fault["times"] = fault.get("times", 1) - 1
                if fault.get("skip", 0):
                    fault["skip"] -= 1
                    fault["times"] += 1
                    path.write_text(json.dumps(faults))
                    continue
                path.write_text(json.dumps(faults))
                return fault
    return {}


def vm() -> dict | None:
    path = WORLD / "vm.json"
    return json.loads(path.read_text()) if path.exists() else None


def set_state(name: str, state: str | None) -> None:
    if name == "queue":
        (WORLD / "queue").write_text(state) if state else (WORLD / "queue").unlink(missing_ok=True)
    else:
        found = vm()
        assert found is not None
        (WORLD / "vm.json").write_text(json.dumps(found | {"state": state}))


def preempt() -> None:
    """The processes of all workers are killed, and their disks are gone."""
    for process in (WORLD / "workers").glob("*/dslt/job/pid"):
        with contextlib.suppress(ProcessLookupError):  # one that has ended already
            os.killpg(int(process.read_text()), signal.SIGKILL)
    shutil.rmtree(WORLD / "workers")
    set_state("vm", "PREEMPTED")


def create(plain: list[str], flags: dict) -> int:
    if vm():
        print("ERROR: (gcloud) ALREADY_EXISTS", file=sys.stderr)
        return 1
    assert Path(flags["metadata-from-file"].removeprefix("startup-script=")).is_file()
    assert flags.get("version") or flags.get("runtime-version")
    workers = int((WORLD / "num_workers").read_text())
    found = {"state": "READY", "type": flags["accelerator-type"], "workers": workers}
    (WORLD / "vm.json").write_text(json.dumps(found))
    return 0


def create_queued(plain: list[str], flags: dict) -> int:
    create(plain, flags)
    set_state("vm", "CREATING")
    set_state("queue", "WAITING_FOR_RESOURCES")
    return 0


def describe(plain: list[str], flags: dict) -> int:
    found = vm()
    if not found:
        print(NOT_FOUND, file=sys.stderr)
        return 1
    print(found["state"], found["type"], found["workers"], sep="|")
    return 0


def describe_queued(plain: list[str], flags: dict) -> int:
    if not (WORLD / "queue").exists():
        print(NOT_FOUND, file=sys.stderr)
        return 1
    print((WORLD / "queue").read_text())
    return 0


def delete(plain: list[str], flags: dict) -> int:
    (WORLD / "vm.json").unlink()
    shutil.rmtree(WORLD / "workers", ignore_errors=True)
    return 0


def delete_queued(plain: list[str], flags: dict) -> int:
    assert "force" in flags
    set_state("queue", None)
    return delete(plain, flags)


def home_of(worker: str) -> Path:
    assert vm()["state"] == "READY" and int(worker) < vm()["workers"]
    home = WORLD / "workers" / worker
    home.mkdir(parents=True, exist_ok=True)
    return home


def ssh(plain: list[str], flags: dict) -> int:
    """As ssh does: the words are joined, and a shell at the other end parses them."""
    home = home_of(flags["worker"])
    inside = {
        "HOME": str(home),
        "USER": "someone",
        "WORKER": flags["worker"],
        "JAX_PROCESS_ID": flags["worker"],
        "JAX_NUM_PROCESSES": str(vm()["workers"]),
        "DSLT_EXTRAS": "",
        "DSLT_HEARTBEATS": str(WORLD / "heartbeats"),
        "PATH": f"{WORLD / 'worker_bin'}:{os.environ['PATH']}",
    }
    command = " ".join(flags["command"].split(" "))
    return subprocess.run(["bash", "-c", command], cwd=home, env=os.environ | inside).returncode


def scp(plain: list[str], flags: dict) -> int:
    *sources, target = plain
    assert target == "paper:", plain
    for source in sources:
        shutil.copy(source, home_of(flags["worker"]))
    return 0


COMMANDS = {
    ("tpu-vm", "create"): create,
    ("tpu-vm", "describe"): describe,
    ("tpu-vm", "delete"): delete,
    ("tpu-vm", "ssh"): ssh,
    ("tpu-vm", "scp"): scp,
    ("queued-resources", "create"): create_queued,
    ("queued-resources", "describe"): describe_queued,
    ("queued-resources", "delete"): delete_queued,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
