"""SeqIO's own caching job (Beam, DirectRunner) on the tasks of the records.

Runs where apache-beam is installed: in an environment of its own, of which
tests/data/beam_requirements.txt says how it is made.
"""

import dataclasses

import pytest

beam = pytest.importorskip(
    "apache_beam", reason="apache-beam is not installed (see beam_requirements.txt)"
)

import seqio  # noqa: E402
from absl import flags  # noqa: E402
from seqio.scripts import cache_tasks_main  # noqa: E402

from dslt.data.tasks import register_tasks  # noqa: E402
from dslt.data.token_cache import TaskSettings, scan_records  # noqa: E402
from dslt.data.vocabulary import load_vocabulary  # noqa: E402
from dslt.records import Rationale, write_rows  # noqa: E402

LENGTHS = {"inputs": 256, "targets": 64}


@pytest.mark.slow
def test_seqios_cached_tasks_give_the_examples_of_the_tasks(examples, tmp_path):
    rows = [
        dataclasses.replace(row, more_rationales=(Rationale("And again.", 0.25),))
        if row.rationale
        else row
        for row in examples
    ]
    write_rows(tmp_path / "records.jsonl", rows)
    vocabulary = load_vocabulary("bytes")  # the pinned sentencepiece reads models, trains none
    names = register_tasks(scan_records(tmp_path / "records.jsonl"), vocabulary, TaskSettings())
    cache = str(tmp_path / "cache")
    flags.FLAGS(["cache_tasks_main"])  # its function reads a flag
    pipeline = beam.Pipeline(runner="DirectRunner")
    cache_tasks_main.run_pipeline(pipeline, names, cache)
    pipeline.run().wait_until_finish()
    seqio.set_global_cache_dirs([cache])
    try:
        for name in names:
            cached, fresh = (read(name, use_cached) for use_cached in (True, False))
            assert cached == fresh and len(fresh) > 40
    finally:
        seqio.set_global_cache_dirs([])


def read(name, use_cached):
    dataset = seqio.get_mixture_or_task(name).get_dataset(
        LENGTHS, "train", use_cached=use_cached, shuffle=False
    )
    return sorted(
        (int(row["row"]), float(row["weight"]), row["inputs"].tolist(), row["targets"].tolist())
        for row in dataset.as_numpy_iterator()
    )
