"""Fuzzes one target of targets.py by coverage, with atheris (extra `fuzz`); logs the executions.

    python tests/fuzz/run.py --target read_examples --runs 100000 --log executions.jsonl

Half of the inputs are libFuzzer's own changes, half those of `mutations.mutate`. Without atheris,
`--mutate` runs the latter alone, which needs nothing installed. A fault ends the run with its
traceback, and its input is left as `FAULTS/<target>-…`.
"""

import argparse
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))
import mutations  # plain; the targets wait for what instruments them

os.environ.setdefault("JAX_PLATFORMS", "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--secs", type=int, default=0, help="stop earlier, after so long")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mutate", action="store_true", help="mutations alone, without atheris")
    parser.add_argument("--log", help="append a line of JSON: target, runs, read, refused, secs")
    parser.add_argument("--faults", default="faults", help="where an input that breaks goes")
    parser.add_argument("--max_input_secs", type=int, default=20, help="a longer one is a hang")
    parser.add_argument("--memory_mb", type=int, default=4096)
    args = parser.parse_args()
    Path(args.faults).mkdir(parents=True, exist_ok=True)
    (run_mutations if args.mutate else run_atheris)(args)


def run_mutations(args) -> None:
    """Goes on behind a fault, and lists each place once."""
    import targets

    def give_up(*_):
        raise TimeoutError(f"more than {args.max_input_secs} s for one input")

    signal.signal(signal.SIGALRM, give_up)
    read, seeds = targets.TARGETS[args.target], targets.seeds(args.target)
    rng, start, accepted = random.Random(args.seed), time.monotonic(), 0
    faults: dict[str, str] = {}
    for number in range(args.runs):
        is_seed = number < len(seeds)
        data = seeds[number] if is_seed else mutations.mutate(rng.choice(seeds), rng, seeds)
        signal.alarm(args.max_input_secs)
        try:
            accepted += read(data)
        except BaseException as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{type(error).__name__} at {frame.filename}:{frame.lineno}"
            if place not in faults:
                path = Path(args.faults) / f"{args.target}-{args.seed}-{number}"
                path.write_bytes(data)
                faults[place] = f"{path}: {str(error)[:200]!r}"
                traceback.print_exc()
        finally:
            signal.alarm(0)
        if args.secs and time.monotonic() - start > args.secs:
            break
    log(args, "mutate", number + 1, accepted, time.monotonic() - start)
    for place, what in faults.items():
        print(f"FAULT {place}\n  {what}")
    sys.exit(bool(faults))


def run_atheris(args) -> None:
    import atheris

    with atheris.instrument_imports(include=["dslt"]):
        import targets
    read, seeds = targets.TARGETS[args.target], targets.seeds(args.target)
    counts = {"runs": 0, "read": 0}
    start = time.monotonic()

    def once(data: bytes) -> None:
        counts["runs"] += 1
        counts["read"] += read(data)
        if counts["runs"] % 1000 == 0:
            write()

    def change(data: bytes, max_size: int, seed: int) -> bytes:
        if seed % 2:
            return atheris.Mutate(data, max_size)
        return mutations.mutate(data, random.Random(seed), seeds)[:max_size]

    def write() -> None:
        if args.log:
            secs = time.monotonic() - start
            Path(f"{args.log}.{os.getpid()}").write_text(
                json.dumps(row_of(args, "atheris", counts["runs"], counts["read"], secs)) + "\n"
            )

    corpus = tempfile.mkdtemp(prefix="dslt-corpus-")
    for number, seed in enumerate(seeds):
        Path(corpus, str(number)).write_bytes(seed)
    longest = 4 * max(map(len, seeds)) + 10_000
    options = [
        f"-runs={args.runs}", f"-seed={args.seed}", f"-max_len={longest}", "-print_final_stats=1",
        f"-timeout={args.max_input_secs}", f"-rss_limit_mb={args.memory_mb}", "-verbosity=0",
        f"-artifact_prefix={args.faults}/{args.target}-",
    ]  # fmt: skip
    options += [f"-max_total_time={args.secs}"] if args.secs else []
    atheris.Setup([sys.argv[0], *options, corpus], once, custom_mutator=change)
    import atexit

    atexit.register(write)
    atheris.Fuzz()


def row_of(args, engine: str, runs: int, accepted: int, secs: float) -> dict:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {
        "target": args.target, "engine": engine, "seed": args.seed, "runs": runs, "read": accepted,
        "refused": runs - accepted, "secs": round(secs, 1), "peak_mb": peak,
    }  # fmt: skip


def log(args, engine: str, runs: int, accepted: int, secs: float) -> None:
    line = json.dumps(row_of(args, engine, runs, accepted, secs))
    print(line)
    if args.log:
        with open(args.log, "a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
