"""How memory and time grow with the number of records, one fresh process a stage.

    python tests/data/scale.py --rows 10000 100000 1000000

Writes so many records, and for each stage prints its seconds and its peak resident memory. What a
stage holds besides its libraries is the difference between two numbers of rows.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

READ = """
from dslt.records import read_examples
print(sum(1 for _ in read_examples(records)))
"""
CACHE = """
from dslt.data.pipeline import open_train_sets
sets = open_train_sets(config, load_vocabulary("bytes"), use_rationales=True)
print(sum(len(part.rows) for part in sets))
"""
CACHE_WITHOUT_TENSORFLOW = (
    """
import itertools, json
import numpy as np
from dslt.data import token_cache
from dslt.records import read_examples

def chunks(index, vocabulary, settings, task, split):
    rows = ((i, e) for i, e in enumerate(read_examples(index.path)) if e.split == split)
    prefix = getattr(settings, f"input_prefix_{task}")
    while part := list(itertools.islice(rows, token_cache.CHUNK_EXAMPLES)):
        columns = []
        for texts in (
            [prefix + e.input for _, e in part],
            [e.label if task == "label" else e.rationale for _, e in part],
        ):
            tokens = [[*vocabulary.encode(text), token_cache.EOS_ID] for text in texts]
            columns += [np.concatenate(tokens), np.array([len(row) for row in tokens])]
        yield *columns, np.array([i for i, _ in part]), np.ones(len(part), np.float32)

def build(key, index, vocabulary, settings, examples, directory):
    task = key["task"].rpartition("_")[2]
    counts = {
        split: token_cache._write_split(
            directory, split, chunks(index, vocabulary, settings, task, split), vocabulary,
            settings, lambda _: None,
        )
        for split in examples
    }
    token_cache._write_json(directory / "meta.json", {**key, "counts": counts})

token_cache._build_task = build
"""
    + CACHE
)
PLAN = """
from dslt.data.pipeline import TrainStream
stream = TrainStream(config, load_vocabulary("bytes"), seed=0, use_rationales=True)
for step in range(0, stream.num_examples // config.batch_examples, stream.order.window_batches):
    stream.counts(step)
print(stream.num_examples)
"""
START = """
from dslt.data.pipeline import TrainStream
stream = TrainStream(config, load_vocabulary("bytes"), seed=0, use_rationales=True)
batches = stream.batches()
for _ in range(3):
    next(batches)
print(stream.num_examples)
"""
EVALUATE = """
from dslt.data.pipeline import read_eval_inputs
found = read_eval_inputs(config, ("validation", "test"), load_vocabulary("bytes"))
print(sum(map(len, found.values())))
"""
STAGES = {
    "read and validate": READ,
    "token cache": CACHE,
    "plan of an epoch": PLAN,
    "start of training": START,
    "inputs of an evaluation": EVALUATE,
}
FRAME = """
import resource, sys, time
from dslt.data.pipeline import DataConfig
from dslt.data.vocabulary import load_vocabulary
records = sys.argv[1]
config = DataConfig(records=(records,), source_length=1024, target_length=512)
started = time.perf_counter()
STAGE
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(time.perf_counter() - started, peak)
"""
HELD_OUT = 100  # in each of validation and test, at the end of the file


def write_records(path: Path, rows: int) -> None:
    """Writes records of about 300 bytes, one at a time."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            left = rows - i
            split = (
                "test" if left <= HELD_OUT else "validation" if left <= 2 * HELD_OUT else "train"
            )
            a, b = i % 997, i % 89
            row = {
                "id": f"example-{i}",
                "dataset": "sums",
                "split": split,
                "input": f"Ann has {a} hats and Bob has {b} hats. How many hats do they have now?",
                "label": str(a + b),
                "rationale": f"Ann's {a} and Bob's {b} are counted together: {a} + {b} = {a + b}.",
                "teacher": "scripted",
            }
            file.write(json.dumps(row) + "\n")


def measure(records: Path, stage: str, code: str) -> tuple[int, float, int]:
    """(what the stage counted, seconds, peak bytes) of a stage in a process of its own."""
    command = [sys.executable, "-c", FRAME.replace("STAGE", code), str(records)]
    env = {"PYTHONPATH": str(Path(__file__).parents[2]), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env)
    if done.returncode:
        raise RuntimeError(f"{stage}: {done.stderr}")
    count, secs, peak = done.stdout.split()
    return int(count), float(secs), int(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument(
        "--without_tensorflow",
        action="store_true",
        help="write the token cache's tokens with numpy alone: quicker, and what the other stages "
        "read is the same",
    )
    parser.add_argument("--directory", help="with room for the records and their token cache")
    args = parser.parse_args()
    for rows in args.rows:
        with tempfile.TemporaryDirectory(dir=args.directory) as directory:
            records = Path(directory) / "records.jsonl"
            write_records(records, rows)
            print(f"{rows:,} rows, {records.stat().st_size / 1e6:,.0f} MB", flush=True)
            for stage in STAGES:
                code = STAGES[stage]
                if args.without_tensorflow and code is CACHE:
                    stage, code = stage + ", numpy", CACHE_WITHOUT_TENSORFLOW
                count, secs, peak = measure(records, stage, code)
                print(f"  {stage:<24} {count:>9,} {secs:9.1f} s {peak / 1e6:9,.0f} MB", flush=True)


if __name__ == "__main__":
    main()
