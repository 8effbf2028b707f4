"""Continuous batching: a free slot is given the next input while the other rows go on.

Rows end after different numbers of tokens. In fixed batches all wait for the longest; here the host
looks at the slots whenever some are free, takes what was decoded and refills them.

    decoder = ContinuousDecoder(graphdef, mesh, rows=64)
    outputs = decoder(decoder.prepare(params), inputs, config=DecodeConfig(), max_length=64)
"""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx

from dslt.core import decode, sharding, t5, topology
from dslt.core.answers import score_answers
from dslt.core.batch import EOS_ID, PAD_ID
from dslt.core.decode import DecodeConfig, Slots, Sources

# Every length of an array is a compilation: sources are padded to multiples of SOURCE_MULTIPLE
# while they are encoded, and kept, as the cache is, at one of two lengths an octave.
SOURCE_MULTIPLE = 16
TARGET_MULTIPLE = 8
SHORTEST = 32
FREE_SHARE = 16  # look at the slots when one in so many is free
ENCODED_SHARE = 4  # encode one in so many slots at a time
KEPT_SHARE = 2  # at the end go on with one in so many slots, once no more of them are live,
FEWEST_ROWS = 8  # down to so many: every number of rows is a compilation too


def prepare(params: dict, *, graphdef: nnx.GraphDef) -> dict:
    """The parameters of the T5 of `graphdef` as decoding takes them: narrow, and unstacked."""
    return t5.unstack_layers(t5.narrow_matrices(params, nnx.merge(graphdef, params).config.dtype))


def slot_shardings(mesh: jax.sharding.Mesh) -> Slots:
    """Where slots lie; each stands for all arrays of its field."""
    rows, heads = sharding.batch_sharding(mesh), sharding.heads_sharding(mesh)
    sources = Sources(cross=heads, mask=rows, numbers=rows, start_ids=rows, answers=rows)
    return Slots(
        step=sharding.replicated(mesh),
        sources=sources,
        self_cache=heads,
        can_see=rows,
        lengths=rows,
        is_live=rows,
        newest=rows,
        tokens=rows,
        beams=rows,
    )


class ContinuousDecoder:
    """Keeps the compiled programs of one model on one mesh.

    Attributes:
      encode, run, score_answers: the programs that a device must have room for.
      start, refill, keep_rows, resize_cache, widen_sources: what is done to slots between them.
    """

    def __init__(self, graphdef: nnx.GraphDef, mesh: jax.sharding.Mesh, rows: int):
        """`rows` decode at a time, rounded up to what the mesh divides.

        `mesh` is a `sharding.decoding_mesh`, or another whose tensor axis divides the heads.
        """
        self.mesh = mesh
        self.multiple = sharding.row_multiple(mesh)
        self.rows = _round_up(rows, self.multiple)
        options = topology.compiler_options(mesh.devices.flat[0], is_training=False)
        jit = functools.partial(jax.jit, compiler_options=options)
        placed = slot_shardings(mesh)
        of_slots = functools.partial(jit, out_shardings=placed)
        self._prepare = jit(prepare, static_argnames="graphdef")
        self.encode = jit(
            decode.encode_sources, static_argnames="graphdef", out_shardings=placed.sources
        )
        self.start = of_slots(
            decode.start_empty, static_argnames=("rows", "config", "cache_length", "max_length")
        )
        self.run = of_slots(
            decode.run, static_argnames=("graphdef", "config"), donate_argnames="slots"
        )
        self.refill = of_slots(decode.refill, donate_argnames="slots")
        self.keep_rows = of_slots(decode.keep_rows)
        self.resize_cache = jit(
            decode.resize_cache,
            static_argnames="cache_length",
            out_shardings=(placed.self_cache, placed.can_see),
        )
        self.widen_sources = jit(
            decode.widen_sources,
            static_argnames="source_length",
            out_shardings=(placed.sources.cross, placed.sources.mask),
        )
        self.score_answers = jit(score_answers, static_argnames="graphdef")
        self.graphdef = graphdef

    def prepare(self, params: dict) -> dict:
        """Done once for all inputs: a slice or a rounding at every call would be a copy."""
        return self._prepare(params, graphdef=self.graphdef)

    def num_encoded(self, rows: int) -> int:
        """Inputs that are encoded at a time, to fill `rows` slots."""
        return min(rows, _round_up(-(-rows // ENCODED_SHARE), self.multiple))

    def __call__(
        self,
        params: dict,
        inputs: Sequence[np.ndarray],
        *,
        config: DecodeConfig,
        max_length: int,
        answers: Sequence[Sequence[Sequence[int]]] | None = None,
        start_id: int = PAD_ID,
        numbers: Sequence[int] | None = None,
        on_decoded: Callable[[int], None] = lambda count: None,
    ) -> list[list[int]]:
        """Decodes each input.

        Args:
          params: of `prepare`.
          inputs: token sequences, int32, of any lengths; an empty one decodes to nothing.
          config: how tokens are chosen. What is drawn for an input depends on its number, not on
            what is decoded beside it.
          max_length: tokens decoded at most, EOS included.
          answers: for each input the token sequences that it may decode to, each ending in EOS and
            no longer than `max_length`.
          start_id: the decoder's first input.
          numbers: of the inputs; their indices by default.
          on_decoded: told how many more inputs have been decoded.

        Returns:
          The tokens before EOS, in the order of `inputs`.
        """
        numbers = range(len(inputs)) if numbers is None else numbers
        with sharding.inside(self.mesh):
            call = _Call(self, params, inputs, config, max_length, answers, start_id, numbers)
            return call.run(on_decoded)

    def score(
        self,
        params: dict,
        inputs: Sequence[np.ndarray],
        answers: Sequence[Sequence[Sequence[int]]],
        on_scored: Callable[[int], None] = lambda count: None,
    ) -> list[np.ndarray]:
        """The log-likelihood, in nats, of each of an input's answers; these end in EOS.

        Returns:
          For each input [number of its answers] float32.
        """
        scores: list[np.ndarray] = [np.zeros(0)] * len(inputs)
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
        rows = min(self.rows, _round_up(max(len(inputs), 1), self.multiple))
        most = max(map(len, answers), default=0)
        for begin in range(0, len(order), rows):
            chosen = order[begin : begin + rows]
            sets = [answers[i] for i in chosen]
            longest = max(len(answer) for answers in sets for answer in answers)
            tokens = pad_inputs([inputs[i] for i in chosen], rows, SOURCE_MULTIPLE)
            targets = pad_answers(sets, (rows, most, _round_up(longest, TARGET_MULTIPLE)))
            placed = jax.device_put((tokens, targets), sharding.batch_sharding(self.mesh))
            with sharding.inside(self.mesh):
                found = np.asarray(self.score_answers(params, *placed, graphdef=self.graphdef))
            for i, row in zip(chosen, found, strict=False):
                scores[i] = row[: len(answers[i])]
            on_scored(len(chosen))
        return scores


class _Call:
    """The inputs of one call: each waits, is encoded beside others, lies in a slot, and is decoded.

    Attributes:
      outputs: tokens of the inputs that have been decoded.
    """

    def __init__(
        self,
        decoder: ContinuousDecoder,
        params: dict,
        inputs: Sequence[np.ndarray],
        config: DecodeConfig,
        max_length: int,
        answers: Sequence[Sequence[Sequence[int]]] | None,
        start_id: int,
        numbers: Sequence[int],
    ):
        """Arguments as of `ContinuousDecoder`'s call."""
        self._decoder = decoder
        self._params = params
        self._inputs = inputs
        self._config = config
        self._max_length = max_length
        self._answers = answers
        self._start_id = start_id
        self._numbers = numbers
        self.outputs: list[list[int]] = [[] for _ in inputs]
        # Shortest first: then the slots' sources grow in length, and never shrink.
        self._waiting = sorted(range(len(inputs)), key=lambda i: len(inputs[i]), reverse=True)
        self._encoded: list[int] = []  # indices of the inputs that wait in `_sources`
        self._sources: Sources | None = None
        self._taken = 0  # of `_sources`
        rows = min(decoder.rows, _round_up(max(len(inputs), 1), decoder.multiple))
        self._index_of_slot = np.full(rows, -1)
        self._num_encoded = decoder.num_encoded(rows)
        self._slots: Slots | None = None

    def run(self, on_decoded: Callable[[int], None]) -> list[list[int]]:
        """Decodes all inputs."""
        self._fill_slots()
        while (self._index_of_slot >= 0).any():
            self._drop_rows()
            on_decoded(self._advance())
            self._fill_slots()
        return self.outputs

    def _fill_slots(self) -> None:
        """Gives every free slot an input, as long as there are any."""
        free = np.flatnonzero(self._index_of_slot < 0)
        while len(free) and (self._waiting or self._encoded):
            if not self._encoded:
                count = min(self._num_encoded, len(self._waiting))
                self._encoded = [self._waiting.pop() for _ in range(count)]
                self._sources, self._taken = self._encode_sources(), 0
                self._make_room()
            count = min(len(free), len(self._encoded))
            self._index_of_slot[free[:count]] = self._encoded[:count]
            self._put(free[:count])
            self._taken += count
            free, self._encoded = free[count:], self._encoded[count:]

    def _encode_sources(self) -> Sources:
        """The inputs that are `_encoded`, in a batch of one size throughout the call."""
        rows = self._num_encoded
        tokens = pad_inputs([self._inputs[i] for i in self._encoded], rows, SOURCE_MULTIPLE)
        allowed = None
        if self._answers is not None:
            longest = max(len(answer) for answers in self._answers for answer in answers)
            shape = rows, max(map(len, self._answers)), longest
            allowed = pad_answers([self._answers[i] for i in self._encoded], shape)
        numbers = np.zeros(rows, np.int32)
        numbers[: len(self._encoded)] = [self._numbers[i] for i in self._encoded]
        start_ids = np.full(rows, self._start_id, np.int32)
        placed = jax.device_put(
            (tokens, numbers, start_ids, allowed), sharding.batch_sharding(self._decoder.mesh)
        )
        return self._decoder.encode(self._params, *placed, graphdef=self._decoder.graphdef)

    def _make_room(self) -> None:
        """Slots, made if there are none yet, that have room for `_sources`."""
        decoder, length = self._decoder, kept_length(self._sources.mask.shape[1])
        if self._slots is None:
            self._slots = decoder.start(
                self._sources,
                rows=len(self._index_of_slot),
                config=self._config,
                cache_length=min(SHORTEST, self._max_length),
                max_length=self._max_length,
            )
        kept = self._slots.sources
        if kept.mask.shape[1] < length:
            cross, mask = decoder.widen_sources(kept.cross, kept.mask, source_length=length)
            self._slots = self._slots._replace(sources=kept._replace(cross=cross, mask=mask))

    def _put(self, free: np.ndarray) -> None:
        """Fills the free slots with what is next in `_sources`."""
        into = np.zeros(len(self._index_of_slot), np.int32)
        into[: len(free)] = free
        places = self._taken + np.arange(len(into))
        places = np.clip(places, 0, self._sources.mask.shape[0] - 1).astype(np.int32)
        self._slots = self._decoder.refill(
            self._slots, self._sources, into, places, np.int32(len(free))
        )

    def _fewer_rows(self) -> int:
        """How many rows to go on with, once no more are live and nothing waits."""
        rows = len(self._index_of_slot)
        fewer = _round_up(max(rows // KEPT_SHARE, FEWEST_ROWS), self._decoder.multiple)
        return min(fewer, rows)

    def _drop_rows(self) -> None:
        """Leaves free slots behind where nothing waits for them: a step of few rows is quicker."""
        while not (self._waiting or self._encoded):
            fewer, is_free = self._fewer_rows(), self._index_of_slot < 0
            if fewer == len(is_free) or (~is_free).sum() > fewer:
                return
            kept = np.argsort(is_free, stable=True)[:fewer].astype(np.int32)
            self._slots = self._decoder.keep_rows(self._slots, kept)
            self._index_of_slot = self._index_of_slot[kept]

    def _advance(self) -> int:
        """Takes steps until slots are free, or a cache is full; how many inputs were decoded."""
        rows, fewer = len(self._index_of_slot), self._fewer_rows()
        stop_at = fewer if fewer < rows else 0
        if self._waiting or self._encoded:
            stop_at = rows - max(rows // FREE_SHARE, 1)
        decoder = self._decoder
        slots = decoder.run(
            self._params, self._slots, stop_at, graphdef=decoder.graphdef, config=self._config
        )
        is_live, lengths, tokens = jax.device_get(
            (slots.is_live, slots.lengths, decode.decoded_tokens(slots))
        )
        ended = np.flatnonzero((self._index_of_slot >= 0) & ~is_live)
        for slot in ended:
            self.outputs[self._index_of_slot[slot]] = before_eos(tokens[slot, : lengths[slot]])
        self._index_of_slot[ended] = -1
        cache_length = slots.can_see.shape[2]
        if (is_live & (lengths >= cache_length)).any():
            length = min(2 * cache_length, self._max_length)
            cache, can_see = decoder.resize_cache(
                slots.self_cache, slots.can_see, slots.step, cache_length=length
            )
            slots = slots._replace(self_cache=cache, can_see=can_see)
        self._slots = slots
        return len(ended)


def pad_inputs(inputs: Sequence[np.ndarray], rows: int, multiple: int) -> np.ndarray:
    """At most `rows` sequences to [rows, length] int32, the length a multiple of `multiple`."""
    longest = max(1, *(len(tokens) for tokens in inputs))
    padded = np.full((rows, _round_up(longest, multiple)), PAD_ID, np.int32)
    for row, tokens in zip(padded, inputs, strict=False):
        row[: len(tokens)] = tokens
    return padded


def pad_answers(
    answers: Sequence[Sequence[Sequence[int]]], shape: tuple[int, int, int]
) -> np.ndarray:
    """Sets of token sequences to `shape` [rows, answers, tokens] int32."""
    padded = np.full(shape, PAD_ID, np.int32)
    for row, answers_of_row in zip(padded, answers, strict=False):
        for place, answer in zip(row, answers_of_row, strict=False):
            place[: len(answer)] = answer
    return padded


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def kept_length(length: int) -> int:
    """The smallest of 32, 48, 64, 96, 128, 192, … that is no less."""
    step = SHORTEST
    while step < length:
        step *= 2
    return step // 4 * 3 if step > SHORTEST and length <= step // 4 * 3 else step


def before_eos(tokens: np.ndarray) -> list[int]:
    """[T] int32 to the tokens before the first EOS."""
    ends = np.flatnonzero(tokens == EOS_ID)
    return tokens[: ends[0] if len(ends) else None].tolist()
