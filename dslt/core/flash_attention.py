"""Attention that never writes its scores to memory: Pallas kernels, forward and backward.

Scores [B, H, Q, N] and T5's relative-position bias [H, Q, N] exist one block at a time on the chip;
HBM holds what is linear in the lengths. Dropout draws the bits of `dropout.dropout`, so the numbers
are those of `attention.plain_attention` up to float rounding. The kernels of TPUs are in
flash_tpu.py, those of NVIDIA GPUs in flash_gpu.py; elsewhere both are interpreted by Pallas: exact
and slow, for tests.

Letters, as in t5.py: B rows, H heads, K head dimension, Q queries, N keys; the kernels see whole
blocks of them.

Forward, for each head, row and block of queries, over the blocks of keys that share a segment:

    s = queries·keysᵀ + bias       masked entries at -1e30
    m' = max(m, max s)             running maximum of each query
    p = exp(s - m')                l' = l·exp(m-m') + Σ p
    a' = a·exp(m-m') + (p ⊙ drop)·values

and at the end out = a / l, and lse = m + log l, all that the backward pass needs of the scores.

Backward, for each pair of blocks:

    p = exp(s - lse)               dp = (dout·valuesᵀ) ⊙ drop
    ds = p ⊙ (dp - δ)              δ = Σ dout ⊙ out, a number a query
    dvalues += (p ⊙ drop)ᵀ·dout    dkeys += dsᵀ·queries    dqueries += ds·keys
    dbias[distance] += Σ ds along its diagonal

Source: Dao et al. 2022 (arXiv 2205.14135); Dao 2023 (arXiv 2307.08691) for δ and lse.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dslt.core import flash_gpu, flash_tpu
from dslt.core.flash_blocks import NOBODY, Static, block_ranges


def flash_attention(
    queries,
    keys,
    values,
    bias,
    query_segments,
    key_segments,
    *,
    is_causal: bool = False,
    dropout_rate: float = 0.0,
    dropout_key=None,
    platform: str = "tpu",
    block: int | None = None,
):
    """softmax(queries·keysᵀ + bias)·values where segments are the same; scores are not scaled.

    Inside of `sharding.inside` rows are split over data and fsdp and heads over tensor.

    Args:
      queries: [B, Q, H, K] float32 or bfloat16; sums and statistics are float32.
      keys, values: [B, N, H, K].
      bias: [H, Q + N - 1] float32, entry d of key minus query position d - (Q - 1); or None.
      query_segments: [B, Q] int32; 0 is padding, and gets zeros.
      key_segments: [B, N] int32; 0 is padding, and is seen by nobody. Segments may lie in any
        order; where each is in one piece, blocks that share none are skipped.
      is_causal: a query sees keys up to its own position.
      dropout_key: None turns dropout off.
      platform: whose kernels, `tpu` or `gpu`.
      block: queries and keys a block, a power of two; compiled, a multiple of 128 on TPUs and of 16
        on GPUs.

    Returns:
      [B, Q, H, K] of the type of `values`.
    """
    num_rows, num_queries, heads, _ = queries.shape
    num_keys = keys.shape[1]
    kernels = {"tpu": flash_tpu, "gpu": flash_gpu}[platform]
    static = Static(
        heads,
        num_queries,
        num_keys,
        block or kernels.block_size(num_queries),
        block or kernels.block_size(num_keys),
        is_causal,
        0.0 if dropout_key is None else dropout_rate,
    )
    words = jnp.zeros(2, jnp.uint32) if dropout_key is None else jax.random.key_data(dropout_key)
    arrays = queries, keys, values, bias, query_segments, key_segments, words

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _attend_shard(kernels.attention, static, (), (), *arrays)
    row_axes = _axes_that_divide(mesh, ("data", "fsdp"), num_rows)
    head_axes = _axes_that_divide(mesh, ("tensor",), heads)
    rows, rows_and_heads = PartitionSpec(row_axes), PartitionSpec(row_axes, None, head_axes)
    by_head = None if bias is None else PartitionSpec(head_axes)
    return jax.shard_map(
        functools.partial(_attend_shard, kernels.attention, static, row_axes, head_axes),
        in_specs=(rows_and_heads,) * 3 + (by_head, rows, rows, PartitionSpec()),
        out_specs=rows_and_heads,
        check_vma=False,  # a pallas_call does not say over which axes its results vary
    )(*arrays)


def _axes_that_divide(mesh, axes: tuple[str, ...], size: int) -> tuple[str, ...]:
    """`axes`, or none where they do not divide `size`: every device then computes all of it."""
    return axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()


def _attend_shard(
    attention, static, row_axes, head_axes, queries, keys, values, bias, query_segments,
    key_segments, words,
):  # fmt: skip
    """One device's rows and heads; arguments and result as `flash_attention`'s."""
    num_rows, num_queries, heads, _ = queries.shape
    first_row = jax.lax.axis_index(row_axes) * num_rows if row_axes else 0
    first_head = jax.lax.axis_index(head_axes) * heads if head_axes else 0
    offsets = jnp.stack([first_row, first_head]).astype(jnp.uint32)

    missing_queries = -num_queries % static.block_queries
    missing_keys = -keys.shape[1] % static.block_keys

    if bias is not None:
        bias = jnp.pad(bias, ((0, 0), (missing_queries, missing_keys)))
    query_segments = jnp.pad(query_segments, ((0, 0), (0, missing_queries)))
    key_segments = jnp.pad(key_segments, ((0, 0), (0, missing_keys)))
    return attention(
        static,
        queries,
        keys,
        values,
        bias,
        (query_segments, jnp.where(key_segments == 0, NOBODY, key_segments)),
        block_ranges(static, query_segments, key_segments),
        jnp.concatenate([words, offsets]),
    )
