"""What comes while others are decoded gets what it would get alone, whatever the slots."""

import collections
import functools

import jax
import numpy as np
import pytest

from dslt.core.answers import score_answers
from dslt.core.batch import EOS_ID
from dslt.core.continuous import before_eos, pad_inputs
from dslt.core.decode import decode_batch
from dslt.core.stream import Stream, StreamPrograms, sizes

SOURCE_LENGTH = 70
MAX_LENGTH = 24
decode = jax.jit(decode_batch, static_argnames=("graphdef", "max_length"))


@pytest.fixture(scope="module")
def inputs() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, 32, n).astype(np.int32) for n in rng.integers(1, SOURCE_LENGTH, 30)]


@pytest.fixture(scope="module")
def programs(golden_t5):
    return StreamPrograms(*golden_t5)


def make_stream(programs, **changes) -> Stream:
    fields = {"source_length": SOURCE_LENGTH, "max_length": MAX_LENGTH, "start_id": 0}
    return Stream(programs, **fields, max_rows=12, **changes)


@pytest.fixture(scope="module")
def alone(golden_t5, inputs):
    """What a batch of all inputs decodes to."""
    graphdef, params = golden_t5
    sources = pad_inputs(inputs, len(inputs), 1)
    found = decode(params, sources, graphdef=graphdef, max_length=MAX_LENGTH)
    return [before_eos(row) for row in np.asarray(found)]


@pytest.mark.parametrize("max_steps", [1, 5, 100])
def test_inputs_that_come_and_go_get_what_they_get_alone(programs, inputs, alone, max_steps):
    stream = make_stream(programs)
    rng = np.random.default_rng(max_steps)
    to_come = list(enumerate(inputs))
    waiting, found, rows = collections.deque(), {}, set()
    while to_come or waiting or stream.num_live:
        arrived = rng.integers(0, 8)
        waiting.extend(to_come[:arrived])
        del to_come[:arrived]
        stream.fill(waiting)
        assert stream.num_live <= 12
        rows.add(len(stream._keys))
        ended = stream.advance(max_steps)
        assert not {key for key, _ in ended} & found.keys()  # each once
        found |= dict(ended)
    assert [found[i] for i in range(len(inputs))] == alone
    assert len(set(map(len, alone))) > 5  # the test would see rows swapped
    assert {8, 12} <= rows  # there were more slots for more


def test_no_more_than_max_steps_are_taken_at_once(programs, inputs, alone):
    longest = max(range(len(inputs)), key=lambda i: len(alone[i]))
    stream = make_stream(programs)
    stream.fill(collections.deque([("it", inputs[longest])]))
    calls = 1
    while not stream.advance(max_steps=4):
        calls += 1
    assert calls == -(-min(len(alone[longest]) + 1, MAX_LENGTH) // 4)


def test_few_live_inputs_go_on_in_fewer_slots(programs, inputs, alone):
    stream = make_stream(programs)
    order = sorted(range(len(inputs)), key=lambda i: len(alone[i]))
    chosen = [*order[:8], order[-1]]
    stream.fill(collections.deque((i, inputs[i]) for i in chosen))
    assert len(stream._keys) == 12
    found = {}
    while stream.num_live:
        found |= dict(stream.advance(max_steps=1))
        assert len(stream._keys) in (0, 8, 12)
        if stream.num_live == 1:
            rows = len(stream._keys)
    assert rows == 8
    assert found == {i: alone[i] for i in chosen}


def test_compiled_beforehand_nothing_compiles_later(golden_t5, inputs):
    programs = StreamPrograms(*golden_t5)
    stream = make_stream(programs)
    stream.compile()
    jitted = (programs._encode, programs._run, programs.refill)
    before = [function._cache_size() for function in jitted]
    waiting = collections.deque(enumerate(inputs))
    for count in (1, 2, 12, 3, 12):
        arrived = collections.deque(waiting.popleft() for _ in range(count))
        while arrived or stream.num_live:
            stream.fill(arrived)
            stream.advance(max_steps=3)
    assert not waiting and [function._cache_size() for function in jitted] == before


def test_scores_are_those_of_teacher_forcing(golden_t5, programs, inputs):
    graphdef, params = golden_t5
    answers = [(5, 7, EOS_ID), (9, EOS_ID)]
    found = programs.score(inputs[0], SOURCE_LENGTH, answers, (4, 8))
    targets = np.array([[[5, 7, EOS_ID], [9, EOS_ID, 0]]], np.int32)
    score = jax.jit(functools.partial(score_answers, graphdef=graphdef))
    expected = score(params, inputs[0][None], targets)
    np.testing.assert_allclose(found, expected[0], rtol=1e-5)  # float32 sums in another order


def test_sizes_end_with_the_last():
    assert sizes(1, 16) == (1, 8, 16) and sizes(64, 200) == (64, 200) and sizes(8, 4) == (4,)
