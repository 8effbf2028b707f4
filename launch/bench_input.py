"""How full the rows are, and how fast batches are prepared on one core.

    python launch/bench_input.py settings/scratch.gin \\
      --gin "pipeline.DataConfig.records = ('runs/svamp/records/records.jsonl',)" \\
      --gin "pipeline.DataConfig.source_length = None"
"""

import argparse
import os
import tempfile
import time

import numpy as np

from dslt import config
from dslt.data.pipeline import TrainStream, make_vocabulary

WARM_UP_STEPS = 16
REPETITIONS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gin_files", nargs="+")
    parser.add_argument("--gin", action="append", default=[])
    args = parser.parse_args()
    data = config.parse(args.gin_files, args.gin).data
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {0})
    with tempfile.TemporaryDirectory() as directory:
        vocabulary = make_vocabulary(data, directory)
        stream = TrainStream(data, vocabulary, seed=0, use_rationales=True)
        print("\n".join(stream.report()))
        rates = measure(stream)
    print(
        f"prepared: {np.median(rates):,.0f} real tokens a second on one core "
        f"(min {min(rates):,.0f}, max {max(rates):,.0f}, {REPETITIONS} windows)"
    )


def measure(stream: TrainStream) -> list[float]:
    """Real tokens a second over each of some windows, planning included."""
    for step in range(WARM_UP_STEPS):
        stream.batch(step)
    rates = []
    for window in range(1, REPETITIONS + 1):
        first = window * stream.order.window_batches
        started_secs = time.perf_counter()
        batches = [stream.batch(first + i) for i in range(stream.order.window_batches)]
        secs = time.perf_counter() - started_secs
        tokens = sum(
            np.count_nonzero(batch.encoder_segment_ids)
            + np.count_nonzero(batch.decoder_segment_ids)
            for batch in batches
        )
        rates.append(tokens / secs)
    return rates


if __name__ == "__main__":
    main()
