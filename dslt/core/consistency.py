"""An experimental term that draws an example's label and its rationale together.

Not the paper's. The student has two views of an example: z, the decoder's mean hidden state over
the label's tokens, and v, the same over its rationale's. What one task knows should be of use to
the other, so their mutual information is made large, by its lower bound (InfoNCE)

    I(z; v) >= log N - loss,    loss = -1/N Σ_i log softmax_j(cos(z_i, v_j) / τ) [j = i]

over the N examples of a batch that have both, taken in both directions and averaged. No softmax
over the vocabulary enters, so none can be applied twice.

Source: for the aim, Chen et al. 2024, "Learning to Maximize Mutual Information for Chain-of-Thought
Distillation" (arXiv 2403.03348), whose own term compares pooled token distributions; for the bound,
van den Oord et al. 2018 (arXiv 1807.03748) and Poole et al. 2019 (arXiv 1905.06922).
"""

import jax
import jax.numpy as jnp

from dslt.core.batch import ROLE_LABEL, ROLE_RATIONALE, Batch


def consistency_loss(
    hidden: jax.Array, batch: Batch, max_examples: int, temperature: float
) -> jax.Array:
    """The loss above: a float32 scalar, nats an example; 0 where no example has both.

    Args:
      hidden: [B, T, D], the decoder's.
      batch: the whole global batch, so that an example's two targets are both in it.
      max_examples: examples with a higher number are left out; a static shape.
      temperature: τ, above 0.
    """
    label, has_label = _mean_by_example(hidden, batch, ROLE_LABEL, max_examples)
    rationale, has_rationale = _mean_by_example(hidden, batch, ROLE_RATIONALE, max_examples)
    is_pair = has_label & has_rationale
    scores = jnp.where(is_pair[None], label @ rationale.T / temperature, -jnp.inf)
    backward = jnp.where(is_pair[None], rationale @ label.T / temperature, -jnp.inf)
    log_shares = [
        jnp.diagonal(each) - jax.nn.logsumexp(jnp.where(is_pair.any(), each, 0.0), axis=-1)
        for each in (scores, backward)
    ]
    total = jnp.where(is_pair, log_shares[0] + log_shares[1], 0.0).sum()
    return -0.5 * total / jnp.maximum(is_pair.sum(), 1)


def _mean_by_example(hidden, batch: Batch, role: int, max_examples: int):
    """[N, D] float32 unit vectors and [N] bool, whether the example has such tokens."""
    is_ours = (batch.decoder_loss_roles == role) & (batch.decoder_loss_weights > 0)
    ids = jnp.where(is_ours, batch.decoder_example_ids, 0).reshape(-1)
    ids = jnp.where(ids > max_examples, 0, ids)
    flat = hidden.astype(jnp.float32).reshape(-1, hidden.shape[-1])
    sums = jax.ops.segment_sum(flat, ids, max_examples + 1)[1:]
    has_any = jax.ops.segment_sum(jnp.ones_like(ids), ids, max_examples + 1)[1:] > 0
    square = jnp.sum(jnp.square(sums), axis=-1, keepdims=True)
    return sums * jax.lax.rsqrt(jnp.where(has_any[:, None], square + 1e-12, 1.0)), has_any
