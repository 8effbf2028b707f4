"""The cache holds what SeqIO gives, is built once, and is whole or not there."""

import concurrent.futures
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import crash_build
import numpy as np
import pytest

from dslt.data import token_cache
from dslt.data.token_cache import (
    TaskSettings,
    _load_array,
    _load_table,
    open_index,
    open_task,
    scan_records,
    truncate,
)
from dslt.data.vocabulary import load_vocabulary
from dslt.errors import InputError
from dslt.records import Example, write_rows

SHORT = TaskSettings(max_input_length=24, max_target_length=9)


@pytest.fixture(scope="module")
def index(cache_dir, records_path):
    return open_index(cache_dir, records_path)


def sequences(table):
    return [part.tolist() for part in np.split(table.tokens, table.offsets[1:-1])]


@pytest.mark.parametrize("spec", ["sentencepiece", "bytes"])
@pytest.mark.parametrize("task", ["label", "rationale"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_it_holds_the_examples_and_tokens_of_seqios_own_path(
    spec, task, split, cache_dir, index, vocabulary
):
    import seqio

    from dslt.data.tasks import register_tasks

    vocabulary = load_vocabulary("bytes") if spec == "bytes" else vocabulary
    cached = open_task(cache_dir, index, "sums", task, vocabulary, SHORT).split(split)
    register_tasks(index, vocabulary, SHORT)
    lengths = {"inputs": SHORT.max_input_length, "targets": SHORT.max_target_length}
    dataset = seqio.get_mixture_or_task(f"sums_{task}").get_dataset(lengths, split, shuffle=False)
    rows = list(dataset.as_numpy_iterator())
    assert sequences(cached.inputs) == [row["inputs"].tolist() for row in rows]
    assert sequences(cached.targets) == [row["targets"].tolist() for row in rows]
    assert cached.rows.tolist() == [row["row"] for row in rows]
    assert [index.example_id(row) for row in cached.rows] == [row["id"].decode() for row in rows]
    assert cached.inputs.tokens.dtype == np.int32 and cached.inputs.offsets.dtype == np.int64


def test_what_is_cut_and_unknown_is_counted(tmp_path, vocabulary):
    path = tmp_path / "r.jsonl"
    texts = ["( 3 + 4 )", "日日", "( 3 + 4 ) ( 3 + 4 ) ( 3 + 4 )"]
    rows = [Example(str(i), "odd", "train", "Ann has", label=t) for i, t in enumerate(texts)]
    write_rows(path, rows)
    ids = [vocabulary.encode(text) for text in texts]
    assert len(ids[0]) < 8 <= len(ids[2]) and ids[1].count(2) > 0
    settings = TaskSettings(max_target_length=8)
    counts = open_task(tmp_path, open_index(tmp_path, path), "odd", "label", vocabulary, settings)
    assert counts.counts["train"] == {
        "examples": 3,
        "input_tokens": 3 * (len(vocabulary.encode("predict: Ann has")) + 1),
        "target_tokens": sum(min(len(tokens) + 1, 8) for tokens in ids),
        "truncated_inputs": 0,
        "truncated_targets": 1,
        "unknown_inputs": 0,
        "unknown_targets": ids[1].count(2),
    }


def test_truncate_by_hand():
    tokens, lengths = truncate(np.array([5, 6, 7, 1, 8, 1, 9, 9, 1]), np.array([4, 2, 3]), 3)
    assert tokens.tolist() == [5, 6, 1, 8, 1, 9, 9, 1]
    assert lengths.tolist() == [3, 2, 3]


def test_a_task_without_examples_is_none(tmp_path, vocabulary):
    write_rows(tmp_path / "r.jsonl", [Example("1", "bare", "test", "Ann has")])
    index = open_index(tmp_path, tmp_path / "r.jsonl")
    for task in ("label", "rationale"):
        assert open_task(tmp_path, index, "bare", task, vocabulary, SHORT) is None


def test_the_directory_changes_with_all_that_its_content_depends_on(
    tmp_path, cache_dir, index, vocabulary, records_path
):
    def directory(task="label", index=index, vocabulary=vocabulary, **settings):
        settings = dataclasses.replace(SHORT, **settings)
        return open_task(cache_dir, index, "sums", task, vocabulary, settings).directory

    shutil.copy(records_path, tmp_path / "copy.jsonl")
    assert directory() == directory(index=open_index(cache_dir, tmp_path / "copy.jsonl"))
    with (tmp_path / "copy.jsonl").open("a") as file:
        file.write(json.dumps({"id": "x", "dataset": "sums", "split": "train", "input": "?"}))
    changed = [
        directory(),
        directory(index=open_index(cache_dir, tmp_path / "copy.jsonl")),
        directory("rationale"),
        directory(vocabulary=load_vocabulary("bytes")),
        directory(label_source="teacher"),
        directory(input_prefix_label="[label] "),
        directory(max_input_length=25),
        directory(max_target_length=10),
    ]
    assert len(set(changed)) == len(changed)
    assert directory() == directory(input_prefix_rationale="why? ")  # of the other task
    assert directory("rationale") == directory("rationale", label_source="teacher")


def test_the_index_counts_and_is_kept(records_path, cache_dir, index, examples):
    scanned = scan_records(records_path)
    assert dict(index.counts) == dict(scanned.counts)
    train = [example for example in examples if example.split == "train"]
    assert index.counts["sums"]["train"] == {
        "examples": 60,
        "gold": sum(example.label is not None for example in train),
        "teacher": sum(example.teacher_label is not None for example in train),
        "rationale": sum(example.rationale is not None for example in train),
    }
    assert [index.example_id(row) for row in (0, 60, 76)] == ["train-0", "validation-0", "test-7"]


DAMAGES = {
    "truncated": lambda d: os.truncate(d / "train.inputs.npy", 200),
    "empty": lambda d: os.truncate(d / "train.targets.npy", 0),
    "missing": lambda d: (d / "train.rows.npy").unlink(),
    "offsets": lambda d: np.save(d / "train.inputs_offsets.npy", np.zeros(3, np.int64)),
    "pickled": lambda d: np.save(d / "train.rows.npy", np.array([{}]), allow_pickle=True),
    "no meta": lambda d: (d / "meta.json").unlink(),
    "meta": lambda d: (d / "meta.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_recognised(damage, tmp_path, cache_dir, index, vocabulary):
    built = open_task(cache_dir, index, "sums", "label", vocabulary, SHORT).directory
    shutil.copytree(built, tmp_path / built.name)
    DAMAGES[damage](tmp_path / built.name)
    with pytest.raises(InputError, match="no whole token cache") as caught:
        open_task(tmp_path, index, "sums", "label", vocabulary, SHORT).split("train")
    assert str(tmp_path / built.name) in str(caught.value)


OPEN = """
import sys
from dslt.data.token_cache import TaskSettings, open_index, open_task
from dslt.data.vocabulary import load_vocabulary
cache_dir, records, vocabulary = sys.argv[1:]
index = open_index(cache_dir, records)
settings = TaskSettings(max_input_length=24, max_target_length=9)
print("building", flush=True)
task = open_task(cache_dir, index, "sums", "label", load_vocabulary(vocabulary), settings)
print(task.directory.name, len(task.split("train").rows), "tensorflow" in sys.modules)
"""


def start(cache_dir, records_path, vocabulary):
    command = [sys.executable, "-c", OPEN, cache_dir, records_path, vocabulary.path]
    return subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_built_cache_opens_without_tensorflow(cache_dir, index, records_path, vocabulary):
    directory = open_task(cache_dir, index, "sums", "label", vocabulary, SHORT).directory
    out, errors = start(cache_dir, records_path, vocabulary).communicate()
    assert out.split()[1:] == [directory.name, "52", "False"], errors
    imported = "import sys, dslt.data.pipeline; print({'tensorflow', 'seqio'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", imported], capture_output=True, text=True)
    assert out.stdout.strip() == "set()"


@pytest.mark.slow
def test_concurrent_builders_and_a_killed_one_leave_a_whole_cache(
    tmp_path, records_path, vocabulary
):
    killed = start(tmp_path, records_path, vocabulary)
    assert killed.stdout.readline() == "building\n"
    time.sleep(1)  # inside the build, which imports TensorFlow for seconds
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not list(tmp_path.glob("sums_label-*"))
    builders = [start(tmp_path, records_path, vocabulary) for _ in range(2)]
    results = [builder.communicate() for builder in builders]
    lines = {out.splitlines()[-1].rsplit(" ", 1)[0] for out, _ in results}
    assert len(lines) == 1, results
    assert [out.split()[-1] for out, _ in results].count("True") == 1  # one built, one waited
    assert len(list(tmp_path.glob("sums_label-*"))) == 1
    assert not list(tmp_path.glob(".*"))  # of the killed one neither


def test_a_failed_build_leaves_nothing_and_the_next_one_succeeds(
    tmp_path, records_path, vocabulary, monkeypatch
):
    index = open_index(tmp_path, records_path)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dslt.data.token_cache._write_json", fail)
        with pytest.raises(InputError, match=r"the disk is full \(No space left on device\)"):
            open_task(tmp_path, index, "sums", "label", vocabulary, SHORT)
    names = {path.name.split("-")[0] for path in tmp_path.iterdir() if path.is_dir()}
    assert names == {"records"}
    assert open_task(tmp_path, index, "sums", "label", vocabulary, SHORT).split("train")


def test_records_that_change_during_a_build_leave_no_cache(
    tmp_path, records_path, second_records_path, vocabulary, monkeypatch
):
    records, cache_dir = tmp_path / "records.jsonl", tmp_path / "cache"
    write = token_cache._write_json

    def replace_and_write(path, value):
        shutil.copy(second_records_path, records)
        write(path, value)

    shutil.copy(records_path, records)
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "_write_json", replace_and_write)
        with pytest.raises(InputError, match="changed while its token cache was built"):
            open_index(cache_dir, records)
        shutil.copy(records_path, records)
        index = scan_records(records)
        with pytest.raises(InputError, match="changed while its token cache was built"):
            open_task(cache_dir, index, "sums", "label", vocabulary, SHORT)
    assert not list(cache_dir.iterdir())
    assert open_index(cache_dir, records).datasets == ("more",)


def test_only_what_nobody_builds_is_swept(tmp_path, records_path):
    """The lock of `held` is another's; `far` is another host's, once new and once a day old."""
    host, old = socket.gethostname(), time.time() - 2 * 86_400
    kept = [f".held~{host}~1", ".far~elsewhere~1"]
    gone = [f".left~{host}~1", ".far~elsewhere~2"]
    for name in (*kept, *gone):
        (tmp_path / name / "inside").mkdir(parents=True)
    os.utime(tmp_path / gone[1], (old, old))
    with (tmp_path / ".held.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        open_index(tmp_path, records_path)
    names = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert names == {*kept, ".held.lock"}


def test_threads_may_open_one_cache_at_once(tmp_path, records_path):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: open_index(tmp_path, records_path).digest, range(8)))
    assert len(set(found)) == 1
    assert len(list(tmp_path.glob("records-*"))) == 1


def test_missing_records_are_the_users_to_mend(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.jsonl: cannot be read"):
        open_index(tmp_path, tmp_path / "nothing.jsonl")


@pytest.mark.parametrize("offsets", [[0, 4, 2, 5], [1, 2, 3, 5], [0.0, 1.0, 2.0, 5.0]])
def test_offsets_that_do_not_ascend_are_damage(offsets, tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(5, dtype=np.int32))
    np.save(tmp_path / "offsets.npy", np.array(offsets))
    with pytest.raises(InputError, match="no ascending offsets"):
        _load_table(tmp_path, "tokens.npy", "offsets.npy", 3)


@pytest.mark.parametrize("header", ["{", "'''", "{'descr': '<i8', 'shape': (99999999999999,)"])
def test_an_array_whose_header_lies_is_damage(header, tmp_path):
    header = header.encode()
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + bytes([len(header), 0]) + header)
    for size in (0, 3):
        with pytest.raises(InputError, match="no whole token cache"):
            _load_array(tmp_path, "a.npy", size)


def test_builders_killed_at_random_moments_leave_a_whole_cache_and_nothing_else(tmp_path):
    """A share of `python tests/data/crash_build.py`."""
    counts = crash_build.crash(tmp_path, kills=3)
    assert counts["killed"] >= 3
