"""Which token comes next, from the logits: the most likely, a random one, or one of an answer set.

Source: top-k Fan et al. 2018 (arXiv 1805.04833); top-p Holtzman et al. 2020 (arXiv 1904.09751).
"""

import jax
import jax.numpy as jnp

from dslt.core.batch import PAD_ID
from dslt.core.keys import seeded_key

BLOCK = 128  # entries that an argmax looks at together; T5's vocabularies are multiples of it


def most_likely(logits: jax.Array) -> jax.Array:
    """[B, V] to [B] int32: the argmax, the first of equals."""
    # One pass over the logits, then the best block alone: a CPU's argmax carries value and index
    # along, is not vectorised, and takes six times as long.
    rows, pieces = logits.shape
    missing = -pieces % BLOCK
    blocks = jnp.pad(logits, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    blocks = blocks.reshape(rows, -1, BLOCK)
    best_block = _first_highest(blocks.max(-1))
    best = jnp.take_along_axis(blocks, best_block[:, None, None], axis=1)[:, 0]
    return jnp.minimum(best_block * BLOCK + _first_highest(best), pieces - 1)


def _first_highest(values: jax.Array) -> jax.Array:
    """[B, N] to [B] int32 by two reductions, N small."""
    is_best = values == values.max(-1, keepdims=True)
    indices = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
    return jnp.where(is_best, indices, values.shape[-1] - 1).min(-1)


def sample(logits: jax.Array, config, numbers: jax.Array, positions: jax.Array) -> jax.Array:
    """One token a row, drawn with the config's temperature, top_k and top_p, in this order.

    A row's noise depends on the seed, its number and its position, not on the rows beside it.

    Args:
      logits: [B, V] float32.
      config: a DecodeConfig.
      numbers: [B] int32, the input's number among all.
      positions: [B] int32, tokens that the row has already.

    Returns:
      [B] int32.
    """
    # How far behind the best: what is kept is what lies within some gap. Equals stay together. A
    # difference of what is in memory: with more to it, compilers round it here so and there so.
    gaps = logits.max(-1, keepdims=True) - logits
    if config.top_k:
        kept = _smallest_gap(gaps, jnp.ones_like(gaps), config.top_k)
        gaps = jnp.where(gaps <= kept, gaps, jnp.inf)
    if config.top_p < 1:
        kept = _smallest_gap(gaps, jax.nn.softmax(-gaps / config.temperature), config.top_p)
        gaps = jnp.where(gaps <= kept, gaps, jnp.inf)

    def noise(number, position):
        key = jax.random.fold_in(seeded_key(config.seed), number)
        return jax.random.gumbel(jax.random.fold_in(key, position), gaps.shape[1:])

    return most_likely(jax.vmap(noise)(numbers, positions) - gaps / config.temperature)


def _smallest_gap(gaps: jax.Array, weights: jax.Array, target: float) -> jax.Array:
    """[B, 1]: the smallest gap within which the weights sum to `target`; [B, V] both.

    By bisection over the bits of a float, whose order is that of floats from 0 on: 31 sums, where
    sorting a vocabulary of 32,128 takes a CPU many times as long.
    """

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        gap = jax.lax.bitcast_convert_type(middle, jnp.float32)
        is_enough = jnp.where(gaps <= gap, weights, 0.0).sum(-1, keepdims=True) >= target
        return jnp.where(is_enough, low, middle + 1), jnp.where(is_enough, middle, high)

    low = jnp.zeros((gaps.shape[0], 1), jnp.int32)
    infinity = jax.lax.bitcast_convert_type(jnp.float32(jnp.inf), jnp.int32)
    bits = jax.lax.fori_loop(0, 31, halve, (low, jnp.full_like(low, infinity)))[1]
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def choose_answer_token(
    logits: jax.Array, answers: jax.Array, tokens: jax.Array, lengths: jax.Array
) -> jax.Array:
    """The most likely token that goes on towards one of a row's answers.

    The trie of a row's answers is kept as its paths: a path is open while the row's tokens are its
    beginning, and the tokens allowed are the next ones of the open paths.

    Args:
      logits: [B, V] float32.
      answers: [B, A, T] int32, each ending in EOS, then PAD_ID; rows of padding alone are none.
      tokens: [B, T] int32, decoded so far.
      lengths: [B] int32, how many these are.

    Returns:
      [B] int32.
    """
    is_past = jnp.arange(answers.shape[2]) < lengths[:, None, None]
    is_open = ((answers == tokens[:, None, : answers.shape[2]]) | ~is_past).all(-1)
    at = jnp.minimum(lengths, answers.shape[2] - 1)[:, None, None]
    next_tokens = jnp.take_along_axis(answers, at, axis=2)[..., 0]  # [B, A]
    is_open &= next_tokens != PAD_ID
    scores = jnp.take_along_axis(logits, next_tokens, axis=1)
    best = jnp.where(is_open, scores, -jnp.inf).argmax(-1)
    return jnp.take_along_axis(next_tokens, best[:, None], axis=1)[:, 0]
