"""Each reader of something from outside: success or InputError, within bounds, on damaged files.

A reduced count of what `run.py` does; `DSLT_FUZZ_RUNS` sets how many inputs a target gets.
"""

import os
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import mutations
import targets

RUNS = int(os.environ.get("DSLT_FUZZ_RUNS", 150))
SLOW = {"parse_gin": 8, "hf_config": 15, "hf_weights": 3, "tokenizer_json": 5}  # times the others


@pytest.mark.parametrize("name", targets.TARGETS)
def test_seeds_are_read(name):
    """Or the mutations would try the first check of a reader alone."""
    assert any([targets.TARGETS[name](seed) for seed in targets.seeds(name)])


@pytest.mark.parametrize("name", targets.TARGETS)
def test_a_damaged_or_forged_file_is_read_or_refused(name):
    seeds = targets.seeds(name)
    rng = random.Random(name)
    for _ in range(RUNS // SLOW.get(name, 1)):
        data = mutations.mutate(rng.choice(seeds), rng, seeds)
        try:
            targets.TARGETS[name](data)
        except Exception as error:
            error.add_note(f"input: {data[:2000]!r}")
            raise
