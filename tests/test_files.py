"""A file appears whole or not at all."""

import errno
import fcntl
import os

import pytest

from dslt.errors import InputError
from dslt.files import full_disk_error, lock_file, replacing, write_text
from dslt.records import Example, write_rows
from dslt.teacher.store import Answer, CompletionStore
from dslt.workdir import MetricsWriter, RunDir, read_json_rows


def test_replaces_at_the_end_of_the_block_and_makes_parents(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_text(path, "old\n")
    with replacing(path) as file:
        file.write("né\n")
        assert path.read_text() == "old\n"
    assert path.read_bytes() == "né\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_what_stood_there_and_nothing_else(tmp_path):
    path = tmp_path / "b.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path, "wb") as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_said_with_what_is_free(number, tmp_path):
    path = tmp_path / "b.txt"
    path.write_text("old")
    with pytest.raises(InputError) as caught, replacing(path) as file:
        file.write("new")
        raise OSError(number, os.strerror(number))
    said = str(caught.value)
    assert said.startswith(f"{path}: the disk is full ({os.strerror(number)}); ")
    assert " MB are free on the file system of " in said and "start the same command again" in said
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_librarys_own_error_over_a_full_disk_counts_and_no_other_does(tmp_path):
    wrapped = ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [28]")
    outer = RuntimeError("the save failed")
    outer.__cause__ = wrapped
    assert full_disk_error(tmp_path / "not" / "there", outer)
    for error in (OSError(errno.EACCES, "Permission denied"), ValueError("shapes"), KeyError(1)):
        assert full_disk_error(tmp_path, error) is None


def test_records_metrics_and_completions_stop_at_a_full_disk_and_go_on_with_room(small_disk):
    disk, resize = small_disk("256k")
    rows = [Example(str(i), "sums", "train", "Ann has hats") for i in range(100)]
    write_rows(disk / "records.jsonl", rows)
    before = (disk / "records.jsonl").read_bytes()
    store = CompletionStore(disk / "store")
    writer = MetricsWriter(RunDir(disk), first_step=1)
    with pytest.raises(InputError, match=f"records.jsonl: the disk is full .* at {disk}"):
        write_rows(disk / "records.jsonl", rows * 100)
    assert (disk / "records.jsonl").read_bytes() == before
    stored = fill(lambda i: store.add_answer(str(i), Answer("said " * 500)))
    logged = fill(lambda i: writer.write(i, {"loss": 0.0}))
    resize("4m")
    store.close()
    with CompletionStore(disk / "store") as store:
        assert len(store.answers) == stored
        store.add_answer("more", Answer("said"))
    writer = MetricsWriter(RunDir(disk), first_step=logged)
    writer.write(logged, {"loss": 1.0})
    writer.close()
    assert [row["step"] for row in read_json_rows(RunDir(disk).metrics)] == list(range(logged + 1))


def fill(write):
    """How many writes there is room for; the next one must say that the disk is full."""
    for i in range(100_000):
        try:
            write(i)
        except InputError as error:
            assert "the disk is full (No space left on device)" in str(error)
            return i
    raise AssertionError("the disk never got full")


def test_a_locked_file_is_nobody_elses_until_it_is_closed(tmp_path):
    path = tmp_path / "lock"
    with path.open("w") as first, path.open("w") as second:
        assert lock_file(first) and not lock_file(second)
        first.close()
        assert lock_file(second)


def test_where_a_file_system_has_no_locks_work_goes_on(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (tmp_path / "lock").open("w") as file:
        assert lock_file(file)
