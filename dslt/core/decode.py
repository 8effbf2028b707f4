"""Greedy decoding with a KV cache: one `lax.while_loop` that stops when all rows have ended."""

import jax
import jax.numpy as jnp
from flax import nnx

from dslt.core.batch import EOS_ID, PAD_ID


def greedy_decode(
    params: dict, input_tokens: jax.Array, *, graphdef: nnx.GraphDef, max_length: int
) -> jax.Array:
    """The most likely token at each position, until EOS.

    Args:
      params: of the T5 of `graphdef`.
      input_tokens: [B, S] int32, one source a row, padded with PAD_ID; a row of padding alone ends
        at once.
      max_length: T, tokens decoded at most, EOS included.

    Returns:
      [B, T] int32: tokens up to and including EOS, then PAD_ID.
    """
    model = nnx.merge(graphdef, params)
    source_mask = input_tokens != PAD_ID
    encoded = model.encode(input_tokens, source_mask.astype(jnp.int32))
    rows = input_tokens.shape[0]

    def not_done(carry):
        index, _, _, has_ended, _ = carry
        return (index < max_length) & ~has_ended.all()

    def decode_one(carry):
        index, last_tokens, cache, has_ended, decoded = carry
        logits, cache = model.decode_step(last_tokens, cache, source_mask, index)
        tokens = jnp.where(has_ended, PAD_ID, logits.argmax(-1).astype(jnp.int32))
        decoded = jax.lax.dynamic_update_slice_in_dim(decoded, tokens[:, None], index, axis=1)
        return index + 1, tokens, cache, has_ended | (tokens == EOS_ID), decoded

    carry = (
        jnp.zeros((), jnp.int32),
        jnp.full(rows, PAD_ID, jnp.int32),
        model.init_cache(encoded, max_length),
        ~source_mask.any(axis=1),
        jnp.full((rows, max_length), PAD_ID, jnp.int32),
    )
    return jax.lax.while_loop(not_done, decode_one, carry)[-1]
