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


def sum_by_role(nll: jax.Array, is_correct: jax.Array, batch: Batch) -> RoleSums:
    """Sums of a forward pass.

    Args:
      nll: [B, T] float32, of each target token.
      is_correct: [B, T] bool, whether it is the most likely one.
      batch: roles and weights; a token of weight 0 adds nothing.
    """
    weights = role_weights(batch)
    return RoleSums(
        nll=jnp.einsum("rbt,bt->r", weights, nll),
        correct=jnp.einsum("rbt,bt->r", weights, is_correct.astype(jnp.float32)),
        tokens=weights.sum((1, 2)),
    )


def objective_weights(batch: Batch, tokens: jax.Array, rationale_weight: float) -> jax.Array:
    """[B, T] float32: the weight of each token's nll in the objective.

    Summed over all tokens of the global batch, `objective_weights · nll` is L_label +
    λ·L_rationale. The authors' code mixes `α·L_label + (1−α)·L_rationale`: λ = (1−α)/α, and its
    scale is α times this one's.

    Args:
      batch: the whole global batch or a part of it.
      tokens: [2] float32, label and rationale tokens of the whole; a role without tokens adds
        nothing.
      rationale_weight: λ.
    """
    shares = jnp.array([1.0, rationale_weight]) / jnp.where(tokens > 0, tokens, 1.0)
    return jnp.einsum("rbt,r->bt", role_weights(batch), shares)
