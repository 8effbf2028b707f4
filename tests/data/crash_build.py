"""Kills processes that build one cache at once, at random moments, and looks at what they leave.

    python tests/data/crash_build.py --kills 20

Each round three processes open the index of one records file in an empty directory; two of them get
SIGKILL somewhere in their start, their wait or their build. The third must end with the whole
index, and a last process must find nothing left of the others.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from dslt.data.token_cache import open_index, scan_records
from dslt.records import Example, write_rows

OPEN = "import sys; from dslt.data.token_cache import open_index; open_index(*sys.argv[1:])"


def crash(directory: Path, kills: int, seed: int = 0, rows: int = 4_000) -> dict[str, int]:
    """Counts `killed` processes, and of them those that died `building`, and rounds.

    Raises:
      AssertionError: a cache is not whole, or something is left.
    """
    rng = random.Random(seed)
    records = directory / "records.jsonl"
    write_rows(records, (Example(str(i), "sums", "train", "Ann has hats") for i in range(rows)))
    expected = scan_records(records)
    command = [sys.executable, "-c", OPEN]
    started = time.perf_counter()
    subprocess.run([*command, directory / "warm", records], check=True)
    usual_secs = time.perf_counter() - started
    counts = {"killed": 0, "building": 0, "rounds": 0}
    while counts["killed"] < kills:
        cache = directory / f"cache-{counts['rounds']}"
        builders = [subprocess.Popen([*command, cache, records]) for _ in range(3)]
        for builder in builders[:2]:
            time.sleep(rng.uniform(0, usual_secs))
            counts["killed"] += builder.poll() is None
            counts["building"] += any(cache.glob(".records-*~*"))
            builder.send_signal(signal.SIGKILL)
        for builder in builders:
            builder.wait()
        assert builders[2].returncode == 0, f"the survivor of round {counts['rounds']} failed"
        for path in cache.glob("records-*"):  # what is left is swept by the next who builds
            path.rename(cache / "whole")
        found = open_index(cache, records)
        for whole in (cache / "whole", next(cache.glob("records-*"))):
            assert np.array_equal(np.load(whole / "ids.npy"), expected.ids.tokens), whole
        assert found.counts == expected.counts
        assert not list(cache.glob(".*")), (
            f"left in round {counts['rounds']}: {list(cache.glob('.*'))}"
        )
        counts["rounds"] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        counts = crash(Path(directory), args.kills, args.seed)
    print(
        f"{counts['killed']} processes killed, {counts['building']} of them while one was building:"
        f" {counts['rounds']} caches whole, nothing left"
    )


if __name__ == "__main__":
    main()
