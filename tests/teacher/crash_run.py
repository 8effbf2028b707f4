"""An extraction against the faulty server, killed at random times, and what came of it.

python tests/teacher/crash_run.py --problems 1000 --concurrency 64 --kills 10
"""

import argparse
import collections
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fault_server import read_log, serving

ROOT = Path(__file__).parents[2]
KEY = "sk-a-secret-that-must-not-be-written"


@dataclasses.dataclass(frozen=True)
class CrashReport:
    """What a killed and resumed extraction left.

    Attributes:
      examples, recorded, listed: rows; those with a rationale, those in the list of rejections.
      answers, doubled: answer lines in the store, and those whose key had one already.
      paid_twice: complete answers that the server gave to a prompt it had answered before.
      repeats: what the summary says was sent again after a kill.
      kills: how many hit a running process.
      faults: what the server did, by kind.
      secs: in all.
    """

    examples: int
    recorded: int
    listed: int
    answers: int
    doubled: int
    paid_twice: int
    repeats: int
    kills: int
    faults: dict[str, int]
    secs: float


def run_with_kills(
    directory: Path,
    *,
    problems: int,
    concurrency: int,
    kills: int,
    fault_rate: float,
    seed: int = 0,
) -> CrashReport:
    """Extracts with `kills` SIGKILLs at random times, then once more until it ends."""
    rng = random.Random(seed)
    log, output = directory / "log.jsonl", directory / "records"
    start = time.monotonic()
    with serving(log, fault_rate=fault_rate, delay_secs=0.02) as base_url:
        command = extract_command(base_url, output, problems, concurrency)
        landed = 0
        for _ in range(kills):
            before = len(log.read_text().splitlines()) if log.exists() else 0
            process = start_extraction(command)
            wait_for_requests(log, before + rng.randint(1, max(2, 2 * problems // kills)), process)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                landed += 1
            process.wait()
        last = start_extraction(command)
        output_text, _ = last.communicate(timeout=500)
        assert last.returncode == 0, output_text
    return report(output, log, landed, time.monotonic() - start)


def extract_command(base_url: str, output: Path, problems: int, concurrency: int) -> list[str]:
    return [
        sys.executable, "-m", "dslt.main", "extract", "--dataset", "facts", "--teacher", "endpoint",
        "--model", "m", "--base_url", base_url, "--output_dir", str(output),
        "--train", str(problems), "--validation", "0", "--test", "0",
        "--concurrency", str(concurrency), "--timeout_secs", "2",
    ]  # fmt: skip


def start_extraction(command: list[str]) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENAI_API_KEY": KEY}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_requests(log: Path, number: int, process: subprocess.Popen) -> None:
    """Returns when the server has dealt with so many requests, or the process has ended."""
    while process.poll() is None:
        if log.exists() and log.read_bytes().count(b"\n") >= number:
            return
        time.sleep(0.002)


def report(output: Path, log: Path, kills: int, secs: float) -> CrashReport:
    records = [json.loads(line) for line in (output / "records.jsonl").open()]
    listed = {json.loads(line)["id"] for line in (output / "rejected.jsonl").open()}
    events = [json.loads(line) for line in (output / "completions.jsonl").open()]
    answers = [event["key"] for event in events if event["event"] == "answer"]
    explained = {record["id"] for record in records if record["rationale"]}
    assert not explained & listed
    done = read_log(log)
    faults = sum(done.values(), collections.Counter())
    paid = ("ok", "content filter")
    return CrashReport(
        examples=len({record["id"] for record in records}),
        recorded=len(explained),
        listed=len(listed),
        answers=len(answers),
        doubled=len(answers) - len(set(answers)),
        paid_twice=sum(max(sum(did[each] for each in paid) - 1, 0) for did in done.values()),
        repeats=json.loads((output / "summary.json").read_text())["repeats"],
        kills=kills,
        faults=dict(faults.most_common()),
        secs=round(secs, 1),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--fault_rate", type=float, default=0.3)
    with tempfile.TemporaryDirectory() as scratch:
        print(run_with_kills(Path(scratch), **vars(parser.parse_args())))
