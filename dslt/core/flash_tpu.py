"""`flash_attention` on TPUs: the Pallas kernels, whose formulas are in flash_attention.py.

A block is [keys, queries], n by q: features or keys run along sublanes and positions along the 128
lanes, so that a head dimension of 64 wastes no lane and statistics of a query are rows. In VMEM,
the chip's scratch memory, lie

    forward    queries [K, q], this head's keys and values [K, N], biases by distance [1, Q+N]
    backward   keys and values [K, n], this head's queries and output gradients [K, Q], query
               gradients [K, Q] float32

A block of the bias is constant along diagonals, so it is made of n + q of the biases by distance in
log2(n) doublings, and its gradient is summed in as many halvings. (`pltpu.roll` with a stride makes
the block in one operation; Mosaic has no negative stride for the gradient, so both are done alike.)
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dslt.core.flash_blocks import LOWEST, MASKED, Static, weights_kept

LANES = 128
MAX_BLOCK = 256


def block_size(length: int) -> int:
    return MAX_BLOCK if length > LANES else LANES


def attention(static: Static, queries, keys, values, bias, segments, ranges, words):
    """[B, Q, H, K] over [B, N, H, K].

    Args:
      bias: [H, Q + N - 1] float32 of whole blocks, or None.
      segments: [B, Q] and [B, N] int32 of whole blocks.
      ranges: of `flash_blocks.block_ranges`.
      words: [4] uint32, of the dropout key and the shard's first row and head.
    """
    if bias is not None:  # by query minus key position + N - 1, and one more to be even
        bias = jnp.pad(bias[:, ::-1], ((0, 0), (0, 1)))[:, None]
    query_segments, key_segments = (x[:, None] for x in segments)

    def positions_last(x, segments):  # [B, N, H, K] -> [B, H, K, N] of whole blocks
        missing = segments.shape[2] - x.shape[1]
        return jnp.pad(x.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, 0), (0, missing)))

    out = _attention(
        static,
        positions_last(queries, query_segments),
        positions_last(keys, key_segments),
        positions_last(values, key_segments),
        bias,
        query_segments,
        key_segments,
        ranges,
        words,
    )
    return out[..., : static.num_queries].transpose(0, 3, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, queries, keys, values, bias, query_segments, key_segments, ranges, words):
    """[B, H, K, Q] over [B, H, K, N]; bias [H, 1, Q+N]; segments [B, 1, Q] and [B, 1, N]."""
    return _forward(
        static, queries, keys, values, bias, query_segments, key_segments, ranges, words
    )[0]


def _forward(static, queries, keys, values, bias, query_segments, key_segments, ranges, words):
    """The result and what the backward pass keeps: the arguments, the result and lse."""
    num_rows, heads, head_dim, num_queries = queries.shape
    num_keys = keys.shape[3]
    block = static.block_queries
    a_block = pl.BlockSpec((1, 1, head_dim, block), lambda h, b, i, *_: (b, h, 0, i))
    whole = pl.BlockSpec((1, 1, head_dim, num_keys), lambda h, b, i, *_: (b, h, 0, 0))
    out, lse = _call(
        functools.partial(_forward_kernel, static),
        (ranges[0], words),
        (queries, keys, values, bias, query_segments, key_segments),
        grid=(heads, num_rows, num_queries // block),
        in_specs=[
            a_block,
            whole,
            whole,
            _bias_spec(bias),
            pl.BlockSpec((1, 1, block), lambda h, b, i, *_: (b, 0, i)),
            pl.BlockSpec((1, 1, num_keys), lambda h, b, i, *_: (b, 0, 0)),
        ],
        out_specs=[
            a_block,
            pl.BlockSpec((1, 1, 1, block), lambda h, b, i, *_: (b, h, 0, i)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(queries.shape, values.dtype),
            jax.ShapeDtypeStruct((num_rows, heads, 1, num_queries), jnp.float32),
        ],
        semantics=("parallel", "parallel", "arbitrary"),
    )
    arrays = queries, keys, values, bias, query_segments, key_segments
    return out, (arrays, ranges, words, out, lse)


def _backward(static, residuals, d_out):
    (queries, keys, values, bias, query_segments, key_segments), ranges, words, out, lse = residuals
    num_rows, heads, head_dim, num_queries = queries.shape
    num_keys = keys.shape[3]
    block = static.block_keys
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(2, keepdims=True)
    whole = pl.BlockSpec((1, 1, head_dim, num_queries), lambda h, b, j, *_: (b, h, 0, 0))
    row = pl.BlockSpec((1, 1, 1, num_queries), lambda h, b, j, *_: (b, h, 0, 0))
    a_block = pl.BlockSpec((1, 1, head_dim, block), lambda h, b, j, *_: (b, h, 0, j))
    d_queries, d_keys, d_values, d_bias = _call(
        functools.partial(_backward_kernel, static),
        (ranges[1], words),
        (queries, keys, values, bias, query_segments, key_segments, d_out, lse, delta),
        grid=(heads, num_rows, num_keys // block),
        in_specs=[
            whole,
            a_block,
            a_block,
            _bias_spec(bias),
            pl.BlockSpec((1, 1, num_queries), lambda h, b, j, *_: (b, 0, 0)),
            pl.BlockSpec((1, 1, block), lambda h, b, j, *_: (b, 0, j)),
            whole,
            row,
            row,
        ],
        out_specs=[whole, a_block, a_block, _bias_spec(bias)],
        out_shape=[
            jax.ShapeDtypeStruct(queries.shape, queries.dtype),
            jax.ShapeDtypeStruct(keys.shape, keys.dtype),
            jax.ShapeDtypeStruct(values.shape, values.dtype),
            None if bias is None else jax.ShapeDtypeStruct(bias.shape, jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((head_dim, num_queries), jnp.float32)],
        semantics=("parallel", "arbitrary", "arbitrary"),  # rows add to one gradient of the bias
    )
    return d_queries, d_keys, d_values, d_bias, None, None, None, None


_attention.defvjp(_forward, _backward)


def _bias_spec(bias):
    """A head's biases; None where there are none, as in a tree of arrays."""
    return bias if bias is None else pl.BlockSpec((1, 1, bias.shape[2]), lambda h, *_: (h, 0, 0))


def _call(
    kernel, scalars, arrays, *, grid, in_specs, out_specs, out_shape, semantics, scratch_shapes=()
):
    """Runs a kernel compiled on a TPU, and interpreted elsewhere."""

    def run(*arguments, interpret):
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=grid,
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=scratch_shapes,
            ),
            out_shape=out_shape,
            compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
            interpret=interpret,
        )(*arguments)

    return jax.lax.platform_dependent(
        *scalars,
        *arrays,
        tpu=functools.partial(run, interpret=False),
        default=functools.partial(run, interpret=True),
    )


def _forward_kernel(
    static, ranges, words, queries, keys, values, bias, query_segments, key_segments, out, lse
):
    head, row, i = (pl.program_id(axis) for axis in range(3))
    head_dim, block_queries = queries.shape[2:]

    def visit(j, carry):
        top, total, mixed = carry
        span = _span(j, static.block_keys)
        s = _scores(
            static, i, j, queries[0, 0], keys[0, 0, :, span], bias,
            query_segments[0], key_segments[0, :, span],
        )  # fmt: skip
        new_top = jnp.maximum(top, s.max(0, keepdims=True))
        p, shrink = jnp.exp(s - new_top), jnp.exp(top - new_top)
        total = total * shrink + p.sum(0, keepdims=True)
        if static.dropout_rate:
            p = p * _drop(static, words, head, row, i, j)
        v = values[0, 0, :, span]
        return new_top, total, mixed * shrink + _dot(v, p.astype(v.dtype), 1, 0)

    start = (
        jnp.full((1, block_queries), LOWEST, jnp.float32),
        jnp.zeros((1, block_queries), jnp.float32),
        jnp.zeros((head_dim, block_queries), jnp.float32),
    )
    at = row * pl.num_programs(2) + i
    top, total, mixed = jax.lax.fori_loop(ranges[0, at], ranges[1, at], visit, start)
    total = jnp.where(total == 0.0, 1.0, total)  # padding: exp(MASKED - lse) must be 0 there too
    out[0, 0] = (mixed / total).astype(out.dtype)
    lse[0, 0] = top + jnp.log(total)


def _backward_kernel(
    static, ranges, words, queries, keys, values, bias, query_segments, key_segments, d_out, lse,
    delta, d_queries, d_keys, d_values, d_bias, d_queries_sum,
):  # fmt: skip
    head, row, j = (pl.program_id(axis) for axis in range(3))
    k, v = keys[0, 0], values[0, 0]

    @pl.when(j == 0)
    def _():
        d_queries_sum[...] = jnp.zeros_like(d_queries_sum)

    if bias is not None:

        @pl.when((row == 0) & (j == 0))
        def _():
            d_bias[...] = jnp.zeros_like(d_bias)

    def visit(i, carry):
        d_k, d_v = carry
        span = _span(i, static.block_queries)
        q, d_o = queries[0, 0, :, span], d_out[0, 0, :, span]
        s = _scores(static, i, j, q, k, bias, query_segments[0, :, span], key_segments[0])
        p, d_p = jnp.exp(s - lse[0, 0, :, span]), _dot(v, d_o, 0, 0)
        dropped = p
        if static.dropout_rate:
            drop = _drop(static, words, head, row, i, j)
            dropped, d_p = p * drop, d_p * drop
        d_s = p * (d_p - delta[0, 0, :, span])
        if bias is not None:
            span_of_bias = _span_of_bias(static, i, j)
            d_bias[0, :, span_of_bias] += _sum_diagonals(d_s)
        d_s = d_s.astype(q.dtype)
        d_queries_sum[:, span] += _dot(k, d_s, 1, 0)
        return d_k + _dot(q, d_s, 1, 1), d_v + _dot(d_o, dropped.astype(d_o.dtype), 1, 1)

    at = row * pl.num_programs(2) + j
    zeros = jnp.zeros(k.shape, jnp.float32)
    d_k, d_v = jax.lax.fori_loop(ranges[0, at], ranges[1, at], visit, (zeros, zeros))
    d_keys[0, 0] = d_k.astype(d_keys.dtype)
    d_values[0, 0] = d_v.astype(d_values.dtype)

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        d_queries[0, 0] = d_queries_sum[...].astype(d_queries.dtype)


def _scores(static, i, j, queries, keys, bias, query_segments, key_segments):
    """Masked scores [n, q] of queries [K, q] and keys [K, n], the i-th and the j-th block."""
    s = _dot(keys, queries, 0, 0)
    if bias is not None:
        s = s + _expand_diagonals(bias[0, :, _span_of_bias(static, i, j)], *s.shape)
    is_seen = key_segments.reshape(-1, 1) == query_segments
    if static.is_causal:
        key, query = (jax.lax.broadcasted_iota(jnp.int32, s.shape, axis) for axis in (0, 1))
        is_seen &= j * static.block_keys + key <= i * static.block_queries + query
    return jnp.where(is_seen, s, MASKED)


def _drop(static, words, head, row, i, j):
    """What dropout multiplies a block with: 0 or 1 / (1 - rate), [n, q] float32."""
    shape = static.block_keys, static.block_queries
    key, query = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (0, 1))
    kept = weights_kept(static, words, row, head, i, j, query, key)
    return jnp.where(kept, 1.0 / (1.0 - static.dropout_rate), 0.0)


def _span_of_bias(static, i, j):
    """Where the n + q biases of a block lie: from those of its last key and its first query."""
    num_keys = -(-static.num_keys // static.block_keys) * static.block_keys
    start = i * static.block_queries - (j + 1) * static.block_keys + num_keys
    alignment = math.gcd(static.block_queries, static.block_keys)
    return pl.ds(pl.multiple_of(start, alignment), static.block_queries + static.block_keys)


def _expand_diagonals(vector, num_keys: int, num_queries: int):
    """[1, n + q] to [n, q]: the last row is the vector's start, each row above lies one later."""
    block = vector
    while block.shape[0] < num_keys:
        above = pltpu.roll(block, vector.shape[1] - block.shape[0], 1)
        block = jnp.concatenate([above, block])
    return block[:, :num_queries]


def _sum_diagonals(block):
    """[n, q] to [1, n + q], the transpose of `_expand_diagonals`."""
    block = jnp.concatenate([block, jnp.zeros((block.shape[0],) * 2, block.dtype)], axis=1)
    while (half := block.shape[0] // 2) > 0:
        block = pltpu.roll(block[:half], half, 1) + block[half:]
    return block


def _span(index, block: int):
    return pl.ds(pl.multiple_of(index * block, block), block)


def _dot(a, b, a_contracted: int, b_contracted: int):
    """A product of matrices over these dimensions, summed in float32."""
    dimensions = (((a_contracted,), (b_contracted,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
