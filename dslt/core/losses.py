"""The objective: L = L_label + λ·L_rationale, each role with its own denominator.

Sums and counts come back, never means: the denominators belong to the whole global batch, which a
microbatch or a device does not see.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dslt.core.batch import ROLE_LABEL, ROLE_RATIONALE, Batch


class RoleSums(NamedTuple):
    """Sums over target tokens, weighted. Each field is [2] float32: label, rationale.

    Attributes:
      nll: negative log-likelihood, nats.
      correct: tokens whose most likely prediction is the target.
      tokens: weights, the denominator of both.
    """

    nll: jax.Array
    correct: jax.Array
    tokens: jax.Array


def role_weights(batch: Batch) -> jax.Array:
    """[2, B, T] float32: the loss weights of label tokens and of rationale tokens."""
    roles = jnp.stack([batch.decoder_loss_roles == role for role in (ROLE_LABEL, ROLE_RATIONALE)])
    return roles * batch.decoder_loss_weights[None]


def sum_by_role(logits: jax.Array, batch: Batch) -> RoleSums:
    """Sums of a forward pass.

    Args:
      logits: [B, T, V] float32.
      batch: its targets, roles and weights; a token of weight 0 adds nothing.
    """
    targets = batch.decoder_target_tokens
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - target_logits  # [B, T]
    is_correct = logits.argmax(axis=-1) == targets
    weights = role_weights(batch)
    return RoleSums(
        nll=jnp.einsum("rbt,bt->r", weights, nll),
        correct=jnp.einsum("rbt,bt->r", weights, is_correct.astype(jnp.float32)),
        tokens=weights.sum((1, 2)),
    )


def combine(nll: jax.Array, tokens: jax.Array, rationale_weight: float) -> jax.Array:
    """The objective from [2] sums of nats and [2] token counts of the whole global batch.

    A role without tokens contributes 0. The authors' code mixes `α·L_label + (1−α)·L_rationale`:
    λ = (1−α)/α, and its scale is α times this one's.
    """
    means = nll / jnp.where(tokens > 0, tokens, 1.0)  # weights below 1 may sum to less than 1
    return means[0] + rationale_weight * means[1]
