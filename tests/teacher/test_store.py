import errno
import json
import multiprocessing
import os

import pytest

from dslt.errors import InputError
from dslt.teacher.store import Answer, CompletionStore


def lines_of(directory):
    return [json.loads(line) for line in (directory / "completions.jsonl").open()]


def test_what_was_stored_is_there_again(tmp_path):
    answer = Answer("é\u2028\n☃", "m", "thought", "stop", 3, 4)
    with CompletionStore(tmp_path) as store:
        store.mark_sent(["a", "b", "c"])
        assert store.add_answer("a", answer)
        store.add_failure("b", "500")
    with CompletionStore(tmp_path) as store:
        assert store.answers == {"a": answer}
        assert store.failures == {"b": "500"}
        assert store.in_flight == {"c"} and store.repeats == 0


def test_an_answer_is_stored_once(tmp_path):
    with CompletionStore(tmp_path) as store:
        assert store.add_answer("a", Answer("first"))
        assert not store.add_answer("a", Answer("second"))
    with CompletionStore(tmp_path) as store:
        assert not store.add_answer("a", Answer("third"))
        assert store.answers["a"].text == "first"
    assert len(lines_of(tmp_path)) == 1


def test_what_is_sent_again_after_a_kill_is_counted_and_a_retried_failure_is_not(tmp_path):
    with CompletionStore(tmp_path) as store:
        store.mark_sent(["killed", "failed"])
        store.add_failure("failed", "500")
    with CompletionStore(tmp_path) as store:
        store.mark_sent(["killed", "failed"])
        assert store.repeats == 1
    with CompletionStore(tmp_path) as store:
        assert store.repeats == 1 and store.in_flight == {"killed", "failed"}


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_half_written_last_line_is_cut_off_and_written_on(tmp_path, cut):
    with CompletionStore(tmp_path) as store:
        store.add_answer("a", Answer("first"))
        store.add_answer("b", Answer("a text of some length"))
    path = tmp_path / "completions.jsonl"
    os.truncate(path, path.stat().st_size - cut)
    with CompletionStore(tmp_path) as store:
        assert "a" in store.answers
        assert ("b" in store.answers) == (cut == 1)  # the newline alone was missing
        assert (store.torn_bytes > 0) == (cut > 1)
        store.add_answer("c", Answer("third"))
    with CompletionStore(tmp_path) as store:
        assert store.answers["a"].text == "first" and store.answers["c"].text == "third"


def test_a_line_that_is_not_the_last_is_never_guessed_at(tmp_path):
    with CompletionStore(tmp_path) as store:
        store.add_answer("a", Answer("first"))
    path = tmp_path / "completions.jsonl"
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(InputError, match=r"completions.jsonl:1: is no event"):
        CompletionStore(tmp_path)
    path.write_text("")  # and the lock was let go
    CompletionStore(tmp_path).close()


def _try_to_open(directory, queue):
    try:
        CompletionStore(directory).close()
        queue.put("opened")
    except InputError as error:
        queue.put(str(error))


def test_a_second_process_is_refused_by_the_first_ones_number(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with CompletionStore(tmp_path):
        other = context.Process(target=_try_to_open, args=(tmp_path, queue))
        other.start()
        message = queue.get(timeout=60)
        other.join()
    assert f"is being written by process {os.getpid()}" in message
    assert "choose another --output_dir" in message
    CompletionStore(tmp_path).close()


def test_a_full_disk_leaves_whole_lines_and_says_so(tmp_path, monkeypatch):
    """The device takes half a line and then nothing, as a full file system does."""
    with CompletionStore(tmp_path) as store:
        store.add_answer("a", Answer("first"))
        size = (tmp_path / "completions.jsonl").stat().st_size
        write, calls = os.write, []

        def full(file, data):
            calls.append(len(data))
            if len(calls) > 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(file, bytes(data)[: len(data) // 2])

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(InputError, match="the disk is full"):
            store.add_answer("b", Answer("second"))
        monkeypatch.undo()
        assert (tmp_path / "completions.jsonl").stat().st_size == size and "b" not in store.answers
        store.add_answer("b", Answer("second"))
    with CompletionStore(tmp_path) as store:
        assert sorted(store.answers) == ["a", "b"] and not store.torn_bytes


ANSWER = {"event": "answer", "key": "a", "text": "first"}


@pytest.mark.parametrize(
    "row",
    [
        *({**ANSWER, name: value} for name in ("key", "text", "model") for value in (1, None, [])),
        *({**ANSWER, name: value} for name in ("input_tokens",) for value in ("1", 0.5, True, -1)),
        {**ANSWER, "reasoning": 1},
        {**ANSWER, "more": 1},
        {"event": "failure", "key": "a", "reason": 500},
        {"event": "sent", "key": {}},
        [],
    ],
)
def test_an_event_of_another_kind_is_refused(tmp_path, row):
    (tmp_path / "completions.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=r"completions.jsonl:1: is no event"):
        CompletionStore(tmp_path)


@pytest.mark.parametrize("end", [b"\0" * 9, b'{"ev', b'{"event": "answer", "key": "b\0\0\0', b"{"])
def test_what_a_power_cut_leaves_is_cut_off(tmp_path, end):
    whole = json.dumps(ANSWER).encode() + b"\n"
    (tmp_path / "completions.jsonl").write_bytes(whole + end)
    with CompletionStore(tmp_path) as store:
        assert store.torn_bytes == len(end) and store.answers["a"].text == "first"
    assert (tmp_path / "completions.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    "content", [b"my notes", b'[{"event": "sent"}', b'{"mine": 1}', b"{" * 9999]
)
def test_a_file_that_is_no_store_is_refused_and_stays(tmp_path, content):
    (tmp_path / "completions.jsonl").write_bytes(content)
    with pytest.raises(InputError, match="is no event of a store"):
        CompletionStore(tmp_path)
    assert (tmp_path / "completions.jsonl").read_bytes() == content
