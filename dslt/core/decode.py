"""Decoding with a KV cache: greedy, sampling or beam search, in slots that can be refilled.

A slot is a row of the decoder's batch. `run` decodes all slots until some of them are free; a free
slot takes the next source by `refill` while the others go on, since the cache is a ring that all
rows write at the same column (see `t5.LayerCache`). Who has a fixed batch calls `decode_batch`:

    tokens = decode_batch(
        params, input_tokens, graphdef=graphdef, max_length=32, config=DecodeConfig()
    )
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dslt.core import beam_search, t5
from dslt.core.batch import EOS_ID, PAD_ID
from dslt.core.beam_search import Beams
from dslt.core.choose import choose_answer_token, most_likely, sample
from dslt.core.t5 import LayerCache
from dslt.errors import InputError

STRATEGIES = ("greedy", "sample", "beam")


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How tokens are chosen.

    Attributes:
      strategy: `greedy`, `sample` or `beam`.
      temperature: of `sample`; logits are divided by it.
      top_k: `sample` draws from the k most likely tokens; 0 means all.
      top_p: then from the most likely ones that together have this probability; 1 means all.
      seed: of `sample`; with the number of the input and the position it makes the key.
      num_beams: of `beam`.
      length_penalty: of `beam`; a finished beam's log-likelihood is divided by length ** penalty.
      early_stopping: of `beam`; end once num_beams beams have ended, whatever the others promise.
    """

    strategy: str = "greedy"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    num_beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool = False

    def __post_init__(self):
        checks = {
            "strategy": (self.strategy in STRATEGIES, f"one of {', '.join(STRATEGIES)}"),
            "temperature": (
                1e-30 <= self.temperature < math.inf,
                "at least 1e-30 and finite (strategy 'greedy' is the limit at 0)",
            ),
            "top_k": (0 <= self.top_k < 2**31, "0 (all tokens) or more, below 2**31"),
            "top_p": (0 < self.top_p <= 1, "0 < top_p <= 1"),
            "seed": (0 <= self.seed < 2**32, "0 <= seed < 2**32"),
            "num_beams": (self.num_beams >= 1, ">= 1"),
            "length_penalty": (math.isfinite(self.length_penalty), "a finite number"),
        }
        for field, (is_legal, expected) in checks.items():
            if not is_legal:
                found = getattr(self, field)
                raise InputError(f"{type(self).__name__}.{field} is {found!r}; expected {expected}")

    def decoding(self) -> "DecodeConfig":
        """These fields alone, without a subclass's own: compiled functions differ by no others."""
        names = [field.name for field in dataclasses.fields(DecodeConfig)]
        return DecodeConfig(**{name: getattr(self, name) for name in names})

    @property
    def beams(self) -> int:
        """M, hypotheses that a row holds at once."""
        return self.num_beams if self.strategy == "beam" else 1


class Sources(NamedTuple):
    """Encoded inputs, ready to be decoded. Every array has a leading axis B.

    Attributes:
      cross: keys and values of each layer, [B, H, S, K].
      mask: [B, S] bool.
      numbers: [B] int32, the inputs' numbers among all, for the random keys.
      start_ids: [B] int32, the decoder's first input.
      answers: [B, A, T] int32, the sequences allowed, each ending in EOS and padded, and rows of
        padding where there are fewer; or None: every sequence is.
    """

    cross: list[tuple[jax.Array, jax.Array]]
    mask: jax.Array
    numbers: jax.Array
    start_ids: jax.Array
    answers: jax.Array | None = None


class Slots(NamedTuple):
    """The decoder's rows between two steps. Arrays but `step` have a leading axis B.

    Attributes:
      step: [] int32, steps taken since the first source came.
      sources: what is decoded.
      self_cache: keys and values of each layer, [B, H, N * M, K].
      can_see: [B, M, N, M] bool; which beams' cached columns are a beam's own past. Beams share the
        cache and remember where they came from, so that no key moves when beams are chosen.
      lengths: [B] int32, tokens decoded.
      is_live: [B] bool.
      newest: [B, M] int32.
      tokens: [B, M, T] int32; for beam search those of the running beams.
      beams: of beam search, else None.
    """

    step: jax.Array
    sources: Sources
    self_cache: list[tuple[jax.Array, jax.Array]]
    can_see: jax.Array
    lengths: jax.Array
    is_live: jax.Array
    newest: jax.Array
    tokens: jax.Array
    beams: Beams | None


def decode_batch(
    params: dict,
    input_tokens: jax.Array,
    *,
    graphdef: nnx.GraphDef,
    max_length: int,
    config: DecodeConfig = DecodeConfig(),
    answers: jax.Array | None = None,
    start_id: int = PAD_ID,
) -> jax.Array:
    """Decodes a batch until its last row has ended.

    Args:
      params: of the T5 of `graphdef`; the decoder's layers may be one by one already.
      input_tokens: [B, S] int32, one source a row, padded with PAD_ID; a row of padding alone ends
        at once.
      max_length: T, tokens decoded at most, EOS included.
      config: how tokens are chosen; greedily by default.
      answers: [B, A, T] int32 as in `Sources`, or None.
      start_id: the decoder's first input.

    Returns:
      [B, T] int32: tokens up to and including EOS, then PAD_ID.
    """
    numbers = jnp.arange(input_tokens.shape[0], dtype=jnp.int32)
    start_ids = jnp.full_like(numbers, start_id)
    params = t5.unstack_layers(params)
    sources = encode_sources(params, input_tokens, numbers, start_ids, answers, graphdef=graphdef)
    slots = start(sources, config, cache_length=max_length, max_length=max_length)
    slots = run(params, slots, 0, graphdef=graphdef, config=config)
    return decoded_tokens(slots)


def encode_sources(
    params: dict,
    input_tokens: jax.Array,
    numbers: jax.Array,
    start_ids: jax.Array,
    answers: jax.Array | None = None,
    *,
    graphdef: nnx.GraphDef,
) -> Sources:
    """Runs the encoder over [B, S] int32 and projects its output for each decoder layer.

    Args:
      params: of `t5.unstack_layers`, here and below.
    """
    model, layers = t5.merge_unstacked(graphdef, params)
    mask = input_tokens != PAD_ID
    encoded = model.encode(model.embed(input_tokens), mask.astype(jnp.int32))
    cross = model.cross_keys_values(encoded, layers)
    return Sources(cross, mask, numbers, start_ids, answers)


def start(sources: Sources, config: DecodeConfig, *, cache_length: int, max_length: int) -> Slots:
    """Slots before the first token of `sources`; those whose source is padding are free.

    Args:
      cache_length: N, columns of the ring; `run` stops when a live row has filled them.
      max_length: T.
    """
    rows, heads, _, head_dim = sources.cross[0][0].shape
    beams = config.beams
    empty = jnp.zeros((rows, heads, cache_length * beams, head_dim), sources.cross[0][0].dtype)
    tokens = jnp.full((rows, beams, max_length), PAD_ID, jnp.int32)
    return Slots(
        step=jnp.zeros((), jnp.int32),
        sources=sources,
        self_cache=[(empty, empty) for _ in sources.cross],
        can_see=jnp.zeros((rows, beams, cache_length, beams), bool),
        lengths=jnp.zeros(rows, jnp.int32),
        is_live=sources.mask.any(axis=1),
        newest=jnp.tile(sources.start_ids[:, None], (1, beams)),
        tokens=tokens,
        beams=beam_search.start(tokens) if config.strategy == "beam" else None,
    )


def start_empty(
    sources: Sources, rows: int, config: DecodeConfig, *, cache_length: int, max_length: int
) -> Slots:
    """So many free slots for sources like these."""
    empty = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), sources)
    return start(empty, config, cache_length=cache_length, max_length=max_length)


def run(
    params: dict,
    slots: Slots,
    stop_at: jax.Array | int,
    max_steps: jax.Array | int | None = None,
    *,
    graphdef: nnx.GraphDef,
    config: DecodeConfig,
) -> Slots:
    """Decodes until at most `stop_at` slots are live, or a live row has filled the cache.

    Or until `max_steps` more steps are taken, if that comes first.
    """
    model, layers = t5.merge_unstacked(graphdef, params)
    cache_length = slots.can_see.shape[2]
    first_step = slots.step

    def should_go_on(slots: Slots):
        is_full = (slots.is_live & (slots.lengths >= cache_length)).any()
        is_over = False if max_steps is None else slots.step - first_step >= max_steps
        return (slots.is_live.sum() > stop_at) & ~is_full & ~jnp.asarray(is_over)

    def decode_one(slots: Slots) -> Slots:
        slots, logits = _forward(model, layers, slots)
        if config.strategy == "beam":
            return _advance_beams(slots, logits, config)
        return _advance(slots, logits[:, 0], config)

    return jax.lax.while_loop(should_go_on, decode_one, slots)


def decoded_tokens(slots: Slots) -> jax.Array:
    """[B, T] int32: what free slots have decoded."""
    return slots.tokens[:, 0] if slots.beams is None else slots.beams.finished[:, 0]


def refill(
    slots: Slots, sources: Sources, into: jax.Array, taken: jax.Array, count: jax.Array
) -> Slots:
    """Puts source `taken[i]` into slot `into[i]` for each i < count; the others are untouched.

    Args:
      sources: of a source length S no greater than the slots' own.
      into, taken: [B] int32.
      count: [] int32.
    """

    def put(i, held):
        def put_row(array, new):
            row = jax.lax.dynamic_slice_in_dim(new, taken[i], 1)
            return jax.lax.dynamic_update_slice_in_dim(array, row, into[i], axis=0)

        return jax.tree.map(put_row, held, sources)

    missing = slots.sources.mask.shape[1] - sources.mask.shape[1]
    sources = sources._replace(mask=jnp.pad(sources.mask, ((0, 0), (0, missing))))
    held = jax.lax.fori_loop(0, count, put, slots.sources)
    is_new = jnp.zeros_like(slots.is_live).at[into].max(jnp.arange(into.shape[0]) < count)

    def reset(array, value):
        return jnp.where(is_new.reshape(-1, *[1] * (array.ndim - 1)), value, array)

    beams = slots.beams and jax.tree.map(reset, slots.beams, beam_search.start(slots.tokens))
    return slots._replace(
        sources=held,
        can_see=reset(slots.can_see, False),
        lengths=reset(slots.lengths, 0),
        is_live=reset(slots.is_live, held.mask.any(axis=1)),
        newest=reset(slots.newest, held.start_ids[:, None]),
        tokens=reset(slots.tokens, PAD_ID),
        beams=beams,
    )


def keep_rows(slots: Slots, kept: jax.Array) -> Slots:
    """The slots `kept` [R] int32 alone, in this order."""
    rows = slots._replace(step=None)
    rows = jax.tree.map(lambda array: jnp.take(array, kept, axis=0), rows)
    return rows._replace(step=slots.step)


def resize_cache(self_cache, can_see, step, cache_length: int) -> tuple:
    """`self_cache` and `can_see` of Slots at `step`, with another number N of columns.

    No less than a live row has filled. Given alone, so that nothing else of the slots is copied.
    """
    old_length = can_see.shape[2]
    last = step - 1
    distances = t5.ring_distances(last, cache_length)
    columns = (last - distances) % old_length

    def resize(cached):  # [B, H, N * M, K]
        split = cached.reshape(*cached.shape[:2], old_length, -1, cached.shape[-1])
        resized = jnp.take(split, columns, axis=2)
        return resized.reshape(*cached.shape[:2], -1, cached.shape[-1])

    can_see = jnp.take(can_see, columns, axis=2) & (distances < old_length)[:, None]
    return jax.tree.map(resize, self_cache), can_see


def widen_sources(cross, mask, source_length: int) -> tuple:
    """`cross` and `mask` of Sources, with room for another length S, no less than their own."""
    missing = source_length - mask.shape[1]

    def widen(array, axis):
        pads = [(0, missing if i == axis else 0) for i in range(array.ndim)]
        return jnp.pad(array, pads)

    return jax.tree.map(lambda array: widen(array, 2), cross), widen(mask, 1)


def _forward(model: t5.T5, layers: list[dict], slots: Slots) -> tuple[Slots, jax.Array]:
    """One step of the model: logits [B, M, V], and the slots with a column of the cache written."""
    rows, beams, cache_length, _ = slots.can_see.shape
    is_own = jnp.eye(beams, dtype=bool)[None, :, None]
    is_own = jnp.broadcast_to(is_own, (rows, beams, 1, beams))
    can_see = jax.lax.dynamic_update_slice_in_dim(
        slots.can_see, is_own, slots.step % cache_length, axis=2
    )
    cache = [
        LayerCache(*past, *cross)
        for past, cross in zip(slots.self_cache, slots.sources.cross, strict=True)
    ]
    logits, cache = model.decode_step(
        slots.newest, layers, cache, slots.sources.mask, slots.step, can_see
    )
    self_cache = [(layer.self_keys, layer.self_values) for layer in cache]
    return slots._replace(step=slots.step + 1, self_cache=self_cache, can_see=can_see), logits


def _advance(slots: Slots, logits: jax.Array, config: DecodeConfig) -> Slots:
    """Appends a token to each live row; logits [B, V]."""
    answers = slots.sources.answers
    if answers is not None:
        tokens = choose_answer_token(logits, answers, slots.tokens[:, 0], slots.lengths)
    elif config.strategy == "sample":
        tokens = sample(logits, config, slots.sources.numbers, slots.lengths)
    else:
        tokens = most_likely(logits)
    length = slots.tokens.shape[2]
    is_here = (jnp.arange(length) == slots.lengths[:, None]) & slots.is_live[:, None]
    lengths = slots.lengths + slots.is_live
    return slots._replace(
        newest=tokens[:, None],
        tokens=jnp.where(is_here[:, None], tokens[:, None, None], slots.tokens),
        lengths=lengths,
        is_live=slots.is_live & (tokens != EOS_ID) & (lengths < length),
    )


def _advance_beams(slots: Slots, logits: jax.Array, config: DecodeConfig) -> Slots:
    """Appends a token to the best beams of each live row; logits [B, M, V]."""
    chosen = beam_search.advance(
        slots.beams,
        slots.tokens,
        slots.lengths,
        logits,
        length_penalty=config.length_penalty,
        early_stopping=config.early_stopping,
    )

    def where_live(new, old):
        return jnp.where(slots.is_live.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    lengths = slots.lengths + slots.is_live
    return slots._replace(
        newest=chosen.newest,
        tokens=where_live(chosen.tokens, slots.tokens),
        can_see=jnp.take_along_axis(slots.can_see, chosen.parents[:, :, None, None], axis=1),
        lengths=lengths,
        beams=jax.tree.map(where_live, chosen.beams, slots.beams),
        is_live=slots.is_live & ~chosen.is_over & (lengths < slots.tokens.shape[2]),
    )
