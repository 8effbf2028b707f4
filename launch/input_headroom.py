"""How much faster batches are made than the shipped slices could take them: a table in Markdown.

Batches of the paper's setting, on this machine: the mean over two windows of the plan, planning
included, and the slowest one. Beside them the shortest time that a step over the same examples
could take on the slice's chips: model FLOPs at their whole peak, nothing lost to memory or links;
T5 codebases report 31 to 42 % of it. Needs no TPU.

    python launch/input_headroom.py runs/svamp/records/records.jsonl runs/cqa/records/records.jsonl
"""

import math
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

from dslt import config
from dslt.core.flops import PEAK_FLOPS, train_step_flops
from dslt.data.pipeline import TrainStream, make_vocabulary

GIN = Path(__file__).parent.parent / "gin"
PEAK = PEAK_FLOPS["TPU v5 lite"]
WINDOWS = 2
# T5's own is not at hand everywhere. One trained on the records makes shorter rows: less to do for
# the step, the same for the input.
VOCABULARY = "pipeline.DataConfig.vocabulary = 'train:4000'"


def main(records: list[str]) -> None:
    print("| slice | records | ms a batch: mean, most | shortest step, ms | times as fast |")
    print("|---|---|---|---|---|")
    for slice_file in sorted((GIN / "slices").glob("*_v5e_*.gin")):
        for path in records:
            print(row(slice_file, path), flush=True)


def row(slice_file: Path, records: str) -> str:
    """A line of the table."""
    configs = config.parse(
        ["runs/step_by_step.gin", "settings/paper.gin", str(slice_file)],
        [f"pipeline.DataConfig.records = ({records!r},)", VOCABULARY],
    )
    with tempfile.TemporaryDirectory() as directory:
        vocabulary = make_vocabulary(configs.data, Path(directory) / "vocabulary")
        stream = TrainStream(configs.data, vocabulary, seed=1, use_rationales=True)
    steps = range(WINDOWS * stream.order.window_batches)
    secs = [batch_secs(stream, step) for step in steps]
    mean = sum(secs) / len(secs)
    chips = math.prod(int(side) for side in slice_file.stem.split("_")[-1].split("x"))
    flops = configs.data.batch_examples * train_step_flops(
        configs.model, *stream.mean_example_tokens()
    )
    shortest = flops / (chips * PEAK)
    cells = [
        f"`{slice_file.stem}`",
        Path(records).parent.name,
        f"{1e3 * mean:.2f}, {1e3 * max(secs):.1f}",
        f"{1e3 * shortest:.1f}",
        f"{shortest / mean:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def batch_secs(stream: TrainStream, step: int) -> float:
    """Seconds to make a batch, and its window's plan where it is the first of one."""
    started = time.perf_counter()
    stream.batch(step)
    return time.perf_counter() - started


if __name__ == "__main__":
    main(sys.argv[1:])
