"""Beam search: the M best beginnings of each row go on, and the M best ended ones are kept.

The rules are those of Hugging Face's `generate`, so that an exported student gives the same tokens
there: 2M candidates a step; those that end compete, with a length penalty, for the M places of
`finished`; the M best that did not end go on.

Source: transformers 5.23, `generation/utils.py`, `_beam_search`. There a batch goes on until all
its rows are over; here a row that is over changes no more, which gives the same.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dslt.core.batch import EOS_ID

NEVER = -1.0e9  # a score below all real ones


class Beams(NamedTuple):
    """What beam search knows of each row besides its running tokens. M beams, T tokens.

    Attributes:
      scores: [B, M] float32, log-likelihoods of the running beams in nats, best first.
      finished: [B, M, T] int32, the best ended sequences, best first.
      finished_scores: [B, M] float32, with the length penalty.
      is_finished: [B, M] bool; which of them there are.
    """

    scores: jax.Array
    finished: jax.Array
    finished_scores: jax.Array
    is_finished: jax.Array


class Chosen(NamedTuple):
    """The outcome of one step: `parents` and `newest` are [B, M] int32, `is_over` [B] bool."""

    beams: Beams
    tokens: jax.Array
    parents: jax.Array
    newest: jax.Array
    is_over: jax.Array


def start(tokens: jax.Array) -> Beams:
    """Before the first token; `tokens` [B, M, T] is padding. One beam is real, the others equal."""
    rows, beams, _ = tokens.shape
    scores = jnp.full((rows, beams), NEVER, jnp.float32)
    return Beams(scores.at[:, 0].set(0.0), tokens, scores, jnp.zeros((rows, beams), bool))


def advance(
    beams: Beams,
    tokens: jax.Array,
    lengths: jax.Array,
    logits: jax.Array,
    *,
    length_penalty: float,
    early_stopping: bool,
) -> Chosen:
    """Appends one token to the beams of each row.

    Args:
      tokens: [B, M, T] int32, the running beams.
      lengths: [B] int32, tokens they have.
      logits: [B, M, V] float32.
    """
    rows, num_beams, max_length = tokens.shape
    vocab_size = logits.shape[-1]
    scores = jax.nn.log_softmax(logits) + beams.scores[..., None]
    scores, places = jax.lax.top_k(scores.reshape(rows, -1), 2 * num_beams)
    parents, newest = places // vocab_size, places % vocab_size
    candidates = jnp.take_along_axis(tokens, parents[..., None], axis=1)
    is_here = jnp.arange(max_length) == lengths[:, None, None]
    candidates = jnp.where(is_here, newest[..., None], candidates)
    lengths = (lengths + 1)[:, None]
    has_ended = (newest == EOS_ID) | (lengths >= max_length)

    running_scores, order = jax.lax.top_k(scores + NEVER * has_ended, num_beams)
    may_finish = has_ended & (jnp.arange(2 * num_beams) < num_beams)
    penalty = lengths.astype(jnp.float32) ** length_penalty
    merged_scores = jnp.concatenate(
        [beams.finished_scores, scores / penalty + NEVER * ~may_finish], axis=1
    )
    finished_scores, best = jax.lax.top_k(merged_scores, num_beams)
    merged = jnp.concatenate([beams.finished, candidates], axis=1)
    are_finished = jnp.concatenate([beams.is_finished, may_finish], axis=1)
    is_finished = jnp.take_along_axis(are_finished, best, axis=1)

    # Could the best running beam, were it to end now, still beat the worst of the finished ones?
    can_improve = running_scores[:, 0] / penalty[:, 0] > finished_scores.min(1)
    is_over = is_finished.all(1) & (early_stopping | ~can_improve)
    return Chosen(
        beams=Beams(
            running_scores,
            jnp.take_along_axis(merged, best[..., None], axis=1),
            finished_scores,
            is_finished,
        ),
        tokens=jnp.take_along_axis(candidates, order[..., None], axis=1),
        parents=jnp.take_along_axis(parents, order, axis=1),
        newest=jnp.take_along_axis(newest, order, axis=1),
        is_over=is_over,
    )
