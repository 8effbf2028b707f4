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
      encode, run, score_answers: those that a device must have room for.
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
        self._start = of_slots(
            decode.start_empty, static_argnames=("rows", "config", "cache_length", "max_length")
        )
        self.run = of_slots(
            decode.run, static_argnames=("graphdef", "config"), donate_argnames="slots"
        )
        self._refill = of_slots(decode.refill, donate_argnames="slots")
        self._keep_rows = of_slots(decode.keep_rows)
        self._resize_cache = jit(
            decode.resize_cache,
            static_argnames="cache_length",
            out_shardings=(placed.self_cache, placed.can_see),
        )
        self._widen_sources = jit(
            decode.widen_sources,
            static_argnames="source_length",
            out_shardings=(placed.sources.cross, placed.sources.mask),
        )
        self.score_answers = jit(score_answers, static_argnames="graphdef")
        self._graphdef = graphdef

    def prepare(self, params: dict) -> dict:
        """Done once for all inputs: a slice or a rounding at every call would be a copy."""
        return self._prepare(params, graphdef=self._graphdef)

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
        with sharding.inside(self.mesh):
            return self._decode(
                params, inputs, config, max_length, answers, start_id, numbers, on_decoded
            )

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
                found = np.asarray(self.score_answers(params, *placed, graphdef=self._graphdef))
            for i, row in zip(chosen, found, strict=False):
                scores[i] = row[: len(answers[i])]
            on_scored(len(chosen))
        return scores

    def _decode(
        self, params, inputs, config, max_length, answers, start_id, numbers, on_decoded
    ) -> list[list[int]]:
        """`__call__`, inside the mesh."""
        numbers = range(len(inputs)) if numbers is None else numbers
        outputs: list[list[int]] = [[] for _ in inputs]
        # Shortest first: then the slots' sources grow in length, and never shrink.
        waiting = sorted(range(len(inputs)), key=lambda i: len(inputs[i]), reverse=True)
        rows = min(self.rows, _round_up(max(len(inputs), 1), self.multiple))
        num_encoded = self.num_encoded(rows)
        index_of_slot = np.full(rows, -1)
        encoded: list[int] = []  # indices of the inputs that wait in `sources`
        slots = None
        while True:
            free = np.flatnonzero(index_of_slot < 0)
            while len(free) and (waiting or encoded):
                if not encoded:
                    encoded = [waiting.pop() for _ in range(min(num_encoded, len(waiting)))]
                    sources = self._encode_sources(
                        params, inputs, encoded, num_encoded, answers, start_id, numbers
                    )
                    taken = 0
                    slots = self._fit(slots, sources, rows, config, max_length)
                count = min(len(free), len(encoded))
                index_of_slot[free[:count]] = encoded[:count]
                slots = self._put(slots, sources, free[:count], taken)
                free, encoded, taken = free[count:], encoded[count:], taken + count
            if (index_of_slot < 0).all():
                return outputs
            if waiting or encoded:
                stop_at = rows - max(rows // FREE_SHARE, 1)
            else:  # the last and longest ones: a step of few rows is quicker
                fewer = _round_up(max(rows // KEPT_SHARE, FEWEST_ROWS), self.multiple)
                if (index_of_slot >= 0).sum() <= fewer < rows:
                    kept = np.argsort(index_of_slot < 0, stable=True)[:fewer].astype(np.int32)
                    slots, index_of_slot = self._keep_rows(slots, kept), index_of_slot[kept]
                    rows = fewer
                    continue
                stop_at = fewer if fewer < rows else 0
            slots = self.run(params, slots, stop_at, graphdef=self._graphdef, config=config)
            is_live, lengths, tokens = jax.device_get(
                (slots.is_live, slots.lengths, decode.decoded_tokens(slots))
            )
            ended = np.flatnonzero((index_of_slot >= 0) & ~is_live)
            for slot in ended:
                outputs[index_of_slot[slot]] = before_eos(tokens[slot, : lengths[slot]])
            index_of_slot[ended] = -1
            on_decoded(len(ended))
            cache_length = slots.can_see.shape[2]
            if (is_live & (lengths >= cache_length)).any():
                length = min(2 * cache_length, max_length)
                resized = self._resize_cache(
                    slots.self_cache, slots.can_see, slots.step, cache_length=length
                )
                slots = slots._replace(self_cache=resized[0], can_see=resized[1])

    def _encode_sources(
        self, params, inputs, indices, rows: int, answers, start_id: int, numbers
    ) -> Sources:
        """The inputs of these indices, encoded in a batch of `rows`."""
        chosen = [inputs[i] for i in indices]
        tokens = pad_inputs(chosen, rows, SOURCE_MULTIPLE)
        allowed = None
        if answers is not None:
            shape = max(map(len, answers)), max(len(a) for sets in answers for a in sets)
            allowed = pad_answers([answers[i] for i in indices], (rows, *shape))
        padded = np.zeros(rows, np.int32)
        padded[: len(indices)] = [numbers[i] for i in indices]
        start_ids = np.full(rows, start_id, np.int32)
        placed = jax.device_put(
            (tokens, padded, start_ids, allowed), sharding.batch_sharding(self.mesh)
        )
        return self.encode(params, *placed, graphdef=self._graphdef)

    def _fit(self, slots: Slots | None, sources: Sources, rows, config, max_length) -> Slots:
        """Slots, made if there are none yet, that have room for `sources`."""
        length = kept_length(sources.mask.shape[1])
        if slots is None:
            slots = self._start(
                sources,
                rows=rows,
                config=config,
                cache_length=min(SHORTEST, max_length),
                max_length=max_length,
            )
        if slots.sources.mask.shape[1] < length:
            sources = slots.sources
            cross, mask = self._widen_sources(sources.cross, sources.mask, source_length=length)
            slots = slots._replace(sources=sources._replace(cross=cross, mask=mask))
        return slots

    def _put(self, slots: Slots, sources: Sources, free: np.ndarray, taken: int) -> Slots:
        """Fills the free slots with the sources from `taken` on."""
        into = np.zeros(slots.is_live.shape[0], np.int32)
        into[: len(free)] = free
        places = np.clip(taken + np.arange(len(into)), 0, sources.mask.shape[0] - 1)
        return self._refill(slots, sources, into, places.astype(np.int32), np.int32(len(free)))


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
