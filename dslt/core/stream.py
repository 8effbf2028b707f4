"""Inputs decoded as they come: one may enter while others are half way through their answers.

`ContinuousDecoder` is handed all inputs at once and compiles for the shapes that it meets. A server
knows neither, so here every shape is one of a few, and all programs can be compiled beforehand:

    programs = StreamPrograms(graphdef, params)
    stream = Stream(programs, source_length=256, max_length=64, start_id=0, max_rows=16)
    stream.fill(waiting)  # a deque of (key, tokens); takes as many as there is room for
    ended = stream.advance(max_steps=8)  # [(key, tokens before EOS), …]
"""

import collections
import functools
from collections.abc import Hashable

import jax
import numpy as np
from flax import nnx

from dslt.core import decode
from dslt.core.answers import score_answers
from dslt.core.batch import EOS_ID
from dslt.core.continuous import before_eos, pad_answers, pad_inputs, prepare
from dslt.core.decode import DecodeConfig, Slots, Sources

GROWTH = 8  # of a size to the next: fewer sizes, fewer programs to compile and more padding
GREEDY = DecodeConfig()


class StreamPrograms:
    """The programs of one model on one device, shared by its streams."""

    def __init__(self, graphdef: nnx.GraphDef, params: dict):
        self._params = jax.jit(functools.partial(prepare, graphdef=graphdef))(params)
        self._graphdef = graphdef
        self._encode = jax.jit(decode.encode_sources, static_argnames="graphdef")
        self._run = jax.jit(_run, static_argnames="graphdef", donate_argnames="slots")
        self._score = jax.jit(score_answers, static_argnames="graphdef")
        self.refill = jax.jit(decode.refill, donate_argnames="slots")

    def encode(self, tokens: np.ndarray, source_length: int, start_id: int) -> Sources:
        """One input, int32, as the only row of Sources of `source_length`."""
        padded = pad_inputs([tokens], 1, source_length)
        ids = np.zeros(1, np.int32), np.full(1, start_id, np.int32)
        return self._encode(self._params, padded, *ids, graphdef=self._graphdef)

    def run(self, slots: Slots, stop_at: int, max_steps: int) -> Slots:
        """`decode.run`, greedily."""
        return self._run(self._params, slots, stop_at, max_steps, graphdef=self._graphdef)

    def score(
        self, tokens: np.ndarray, source_length: int, answers, shape: tuple[int, int]
    ) -> np.ndarray:
        """The log-likelihood, in nats, of each answer, the rest of `shape` [A, T] being padding."""
        padded = pad_inputs([tokens], 1, source_length), pad_answers([answers], (1, *shape))
        scores = self._score(self._params, *padded, graphdef=self._graphdef)
        return np.asarray(scores)[0, : len(answers)]


class Stream:
    """Slots for inputs of at most `source_length` tokens, decoded greedily to `max_length`.

    Not to be shared by threads.
    """

    def __init__(
        self,
        programs: StreamPrograms,
        *,
        source_length: int,
        max_length: int,
        start_id: int,
        max_rows: int,
    ):
        """There are `max_rows` slots at most, and fewer while few are live: such steps are quicker.

        Args:
          max_length: tokens decoded at most, EOS included.
          start_id: the decoder's first input.
        """
        self._programs = programs
        self._source_length, self._max_length = source_length, max_length
        self._start_id = start_id
        self._row_counts = sizes(1, max_rows)
        self._shapes: dict[int, Slots] = {}  # of slots by their number
        self._slots: Slots | None = None
        self._keys: list[Hashable | None] = []  # of the input in each slot; None: free

    @property
    def num_live(self) -> int:
        return sum(key is not None for key in self._keys)

    def fill(self, waiting: collections.deque) -> int:
        """Takes (key, tokens) from the left while there is room; returns how many it took."""
        count = min(len(waiting), self._row_counts[-1] - self.num_live)
        if count:
            self._make_room(self.num_live + count)
        for _ in range(count):
            key, tokens = waiting.popleft()
            source = self._programs.encode(tokens, self._source_length, self._start_id)
            self._put(key, source)
        return count

    def advance(self, max_steps: int) -> list[tuple[Hashable, list[int]]]:
        """Decodes until an input has ended, `max_steps` tokens at most; with none live, nothing.

        Returns:
          (key, tokens before EOS) of the inputs that have ended.
        """
        if not self.num_live:
            return []
        self._make_room(self.num_live)
        self._slots = self._programs.run(self._slots, self.num_live - 1, max_steps)
        is_live = np.asarray(self._slots.is_live)
        ended = [i for i, key in enumerate(self._keys) if key is not None and not is_live[i]]
        if not ended:
            return []
        tokens, lengths = jax.device_get((decode.decoded_tokens(self._slots), self._slots.lengths))
        found = [(self._keys[i], before_eos(tokens[i, : lengths[i]])) for i in ended]
        for i in ended:
            self._keys[i] = None
        if not self.num_live:
            self._slots, self._keys = None, []
        return found

    def _make_room(self, count: int) -> None:
        """Slots for `count` live ones, or for twice as many where that is fewer than there are."""
        rows = next(size for size in self._row_counts if size >= count)
        if self._slots is None:
            self._keys = [None] * rows
            return
        if rows <= len(self._keys):
            rows = next((size for size in self._row_counts if size >= 2 * count), rows)
        if count > len(self._keys) or rows < len(self._keys):
            live = [i for i, key in enumerate(self._keys) if key is not None]
            kept = np.zeros(rows, np.int32)
            kept[: len(live)] = live
            self._slots = resize(self._slots, kept, len(live))
            self._keys = [self._keys[i] for i in live] + [None] * (rows - len(live))

    def _put(self, key: Hashable, source: Sources) -> None:
        rows = len(self._keys)
        if self._slots is None:
            if rows not in self._shapes:
                self._shapes[rows] = slots_like(source, rows, self._max_length)
            # Slots without a source are zeros, and need no program: padding, and not live.
            zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self._shapes[rows])
            self._slots = jax.device_put(zeros)
        slot = self._keys.index(None)
        into = np.full(rows, slot, np.int32)
        self._slots = self._programs.refill(
            self._slots, source, into, np.zeros(rows, np.int32), np.int32(1)
        )
        self._keys[slot] = key

    def compile(self) -> None:
        """Runs every program of the stream once, on inputs of no meaning."""
        tokens = np.array([EOS_ID], np.int32)
        for rows in self._row_counts:
            self.fill(collections.deque([(i, tokens) for i in range(rows)]))
            self.advance(1)
            self._slots, self._keys = None, []


def sizes(first: int, last: int) -> tuple[int, ...]:
    """first, GROWTH · first, … and `last`: what lengths and numbers of rows are rounded up to."""
    found = []
    while first < last:
        found.append(first)
        first *= GROWTH
    return (*found, last)


def slots_like(source: Sources, rows: int, max_length: int) -> Slots:
    """The shapes and dtypes of slots for sources like this one."""
    empty = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), source)
    make = functools.partial(
        decode.start, config=GREEDY, cache_length=max_length, max_length=max_length
    )
    return jax.eval_shape(make, empty)


def resize(slots: Slots, kept: np.ndarray, count: int) -> Slots:
    """The slots `kept` [R] int32; all but the first `count` of them are free.

    On the host: on a CPU that is the same copy, and needs no program for each pair of sizes.
    """
    rows = jax.tree.map(lambda x: np.take(np.asarray(x), kept, axis=0), slots._replace(step=None))
    rows.is_live[count:] = False
    return jax.device_put(rows)._replace(step=slots.step)


def _run(params, slots: Slots, stop_at, max_steps, *, graphdef) -> Slots:
    # Only a step's place in the ring says anything, so a server may count for ever.
    slots = slots._replace(step=slots.step % slots.can_see.shape[2])
    return decode.run(params, slots, stop_at, max_steps, graphdef=graphdef, config=GREEDY)
