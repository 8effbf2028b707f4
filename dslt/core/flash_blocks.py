"""What the kernels of flash_attention.py share, on TPUs and on GPUs."""

from typing import NamedTuple

import jax.numpy as jnp

from dslt.core.dropout import is_kept

MASKED = -1e30
LOWEST = -1e20  # a running maximum starts here, above MASKED: exp(MASKED - LOWEST) is 0
NOBODY = -1  # the segment of a padded key, which no query has


class Static(NamedTuple):
    """What a kernel is compiled for. Lengths are before padding, heads those of all shards."""

    heads: int
    num_queries: int
    num_keys: int
    block_queries: int
    block_keys: int
    is_causal: bool
    dropout_rate: float


def block_ranges(static: Static, query_segments, key_segments):
    """Which blocks meet: for each block of queries its first and last+1 block of keys, and back.

    Returns:
      A pair of [2, B * blocks] int32: of queries, of keys.
    """

    def bounds(segments, block):  # the lowest and highest segment of each block, padding apart
        blocks = segments.reshape(segments.shape[0], -1, block)
        lowest = jnp.where(blocks == 0, jnp.iinfo(jnp.int32).max, blocks).min(-1)
        return lowest, blocks.max(-1)

    query_low, query_high = (x[:, :, None] for x in bounds(query_segments, static.block_queries))
    key_low, key_high = (x[:, None] for x in bounds(key_segments, static.block_keys))
    meet = (query_low <= key_high) & (key_low <= query_high)  # [B, blocks of queries, of keys]
    if static.is_causal:
        last_query = (jnp.arange(meet.shape[1]) + 1) * static.block_queries - 1
        meet &= jnp.arange(meet.shape[2]) * static.block_keys <= last_query[:, None]

    def span(meet):
        after_last = meet.shape[-1] - meet[..., ::-1].argmax(-1)
        ends = jnp.where(meet.any(-1), jnp.stack([meet.argmax(-1), after_last]), 0)
        return ends.reshape(2, -1).astype(jnp.int32)

    return span(meet), span(meet.swapaxes(1, 2))


def weights_kept(static: Static, words, row, head, i, j, query, key):
    """What dropout keeps of the weights of the i-th block of queries and the j-th of keys, bool.

    An entry's index is its place in [B, H, Q, N] of all shards, before padding.

    Args:
      words: [4] uint32, of the dropout key and the shard's first row and head.
      query, key: uint32, an entry's place in the block; they broadcast to the block's shape.
    """
    row, head = row.astype(jnp.uint32) + words[2], head.astype(jnp.uint32) + words[3]
    first_query = (i * static.block_queries).astype(jnp.uint32)
    first_key = (j * static.block_keys).astype(jnp.uint32)
    num_queries, num_keys = jnp.uint32(static.num_queries), jnp.uint32(static.num_keys)
    first = ((row * jnp.uint32(static.heads) + head) * num_queries + first_query) * num_keys
    index = (first + first_key) + query * num_keys + key
    return is_kept(index, static.dropout_rate, words[0], words[1])
