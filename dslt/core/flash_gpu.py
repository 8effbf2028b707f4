"""`flash_attention` on NVIDIA GPUs: Pallas kernels that Triton compiles.

A program has a block of queries, or of keys, and walks over the blocks of the other side that share
a segment with it. Its arrays are those of the model, [B, N, H, K], in HBM: loads find a head's rows
there, so that nothing is transposed or padded. A block of the bias is looked up by distance. Names,
formulas and dropout are those of flash_attention.py; here blocks are [q, n].

The gradient of the bias is a sum over all rows along diagonals, and programs cannot add to one
array in a fixed order. A kernel of its own walks over the pairs of blocks at one offset from each
other: each pair has the same distances at the same places, so their sum is one block, whose
diagonals are then summed outside. The scores are computed three times on the way back.

What takes the time is not the products but some thirty operations on each score, so scores are in
units of log 2 (a power of two is one instruction, an exponential eight), and lse too.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from dslt.core.flash_blocks import LOWEST, MASKED, Static, weights_kept

BLOCK = 64
NUM_WARPS = 4
NUM_STAGES = 2  # of loads ahead of their use
SPLITS = 16  # of rows, in the sums for the bias's gradient: more are more programs and more memory


def block_size(length: int) -> int:
    return BLOCK


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(static: Static, queries, keys, values, bias, segments, ranges, words):
    """[B, Q, H, K] over [B, N, H, K]; blocks of queries and of keys are of one size.

    Args:
      bias: [H, Q + N - 1] float32 of whole blocks, or None.
      segments: [B, Q] and [B, N] int32 of whole blocks.
      ranges: of `flash_blocks.block_ranges`.
      words: [4] uint32, of the dropout key and the shard's first row and head.
    """
    return _forward(static, queries, keys, values, bias, segments, ranges, words)[0]


def _forward(static, queries, keys, values, bias, segments, ranges, words):
    num_rows, _, heads, _ = queries.shape
    length = segments[0].shape[1]
    out, lse = _call(
        functools.partial(_forward_kernel, static),
        (length // static.block_queries, num_rows, heads),
        [
            jax.ShapeDtypeStruct(queries.shape, values.dtype),
            jax.ShapeDtypeStruct((num_rows, heads, length), jnp.float32),
        ],
        (ranges[0], words, queries, keys, values, bias, *segments),
    )
    return out, (queries, keys, values, bias, segments, ranges, words, out, lse)


def _backward(static, saved, d_out):
    queries, keys, values, bias, segments, ranges, words, out, lse = saved
    num_rows, _, heads, _ = queries.shape
    query_blocks, key_blocks = (x.shape[1] // static.block_queries for x in segments)
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, lse.shape[2] - delta.shape[2])))
    arrays = words, queries, keys, values, bias, *segments, d_out, lse, delta
    (d_queries,) = _call(
        functools.partial(_queries_kernel, static),
        (query_blocks, num_rows, heads),
        [jax.ShapeDtypeStruct(queries.shape, queries.dtype)],
        (ranges[0], *arrays),
    )
    d_keys, d_values = _call(
        functools.partial(_keys_kernel, static),
        (key_blocks, num_rows, heads),
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (keys, values)],
        (ranges[1], *arrays),
    )
    d_bias = None
    if bias is not None:
        splits, offsets = min(SPLITS, num_rows), query_blocks + key_blocks - 1
        a_block = static.block_queries, static.block_keys
        (sums,) = _call(
            functools.partial(_bias_kernel, static, num_rows, query_blocks),
            (offsets, splits, heads),
            [jax.ShapeDtypeStruct((splits, heads, offsets, *a_block), jnp.float32)],
            (ranges[0], *arrays),
        )
        d_bias = _sum_diagonals(sums.sum(0))
    return d_queries, d_keys, d_values, d_bias, None, None, None


attention.defvjp(_forward, _backward)


def _call(kernel, grid, out_shape, arguments):
    """Runs a kernel compiled on GPUs, and interpreted elsewhere."""

    def run(*arguments, interpret):
        return pl.pallas_call(
            kernel,
            grid=grid,
            out_shape=out_shape,
            compiler_params=pltriton.CompilerParams(num_warps=NUM_WARPS, num_stages=NUM_STAGES),
            interpret=interpret,
        )(*arguments)

    return jax.lax.platform_dependent(
        *arguments,
        cuda=functools.partial(run, interpret=False),
        rocm=functools.partial(run, interpret=False),  # not tried, but never interpreted unasked
        default=functools.partial(run, interpret=True),
    )


def _forward_kernel(
    static, ranges, words, queries, keys, values, bias, query_segments, key_segments, out, lse
):
    i, row, head = (pl.program_id(axis) for axis in range(3))
    q = _load(static, queries, row, i, head)

    def visit(j, carry):
        top, total, mixed = carry
        k, v = (_load(static, x, row, j, head) for x in (keys, values))
        s = _scores(static, row, head, i, j, q, k, bias, query_segments, key_segments)
        new_top = jnp.maximum(top, s.max(1))
        p, shrink = jnp.exp2(s - new_top[:, None]), jnp.exp2(top - new_top)
        total = total * shrink + p.sum(1)
        if static.dropout_rate:
            p = jnp.where(_is_kept(static, words, row, head, i, j), p, 0.0)
        return new_top, total, mixed * shrink[:, None] + _dot(p.astype(v.dtype), v, 1, 0)

    start = (
        jnp.full(q.shape[:1], LOWEST, jnp.float32),
        jnp.zeros(q.shape[:1], jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    at = row * pl.num_programs(0) + i
    top, total, mixed = jax.lax.fori_loop(ranges[0, at], ranges[1, at], visit, start)
    total = jnp.where(total == 0.0, 1.0, total)  # padding: exp(MASKED - lse) must be 0 there too
    _store(static, out, row, i, head, mixed / (total * (1.0 - static.dropout_rate))[:, None])
    lse[row, head, _span(static, i)] = top + jnp.log2(total)


class _Inputs(NamedTuple):
    """References to what the kernels of the way back read."""

    words: jax.Array
    queries: jax.Array
    keys: jax.Array
    values: jax.Array
    bias: jax.Array | None
    query_segments: jax.Array
    key_segments: jax.Array
    d_out: jax.Array
    lse: jax.Array
    delta: jax.Array

    def of_queries(self, static, row, i, head):
        """q and dout [q, K], lse and delta [q, 1]."""
        blocks = (_load(static, x, row, i, head) for x in (self.queries, self.d_out))
        numbers = (x[row, head, _span(static, i)][:, None] for x in (self.lse, self.delta))
        return *blocks, *numbers

    def of_keys(self, static, row, j, head):
        """k and v [n, K]."""
        return tuple(_load(static, x, row, j, head) for x in (self.keys, self.values))


def _gradients(static, inputs: _Inputs, row, head, i, j, of_queries, of_keys):
    """The weights kept and ds of a pair of blocks, [q, n] float32."""
    (q, d_o, lse, delta), (k, v) = of_queries, of_keys
    segments = inputs.query_segments, inputs.key_segments
    s = _scores(static, row, head, i, j, q, k, inputs.bias, *segments)
    p = jnp.exp2(s - lse)
    d_p, kept = _dot(d_o, v, 1, 1), p
    if static.dropout_rate:
        chosen = _is_kept(static, inputs.words, row, head, i, j)
        kept, d_p = (jnp.where(chosen, x, 0.0) for x in (p, d_p))
        d_p = d_p * (1.0 / (1.0 - static.dropout_rate))
    return kept, p * (d_p - delta)


def _queries_kernel(static, ranges, *arrays):
    inputs, d_queries = _Inputs(*arrays[:-1]), arrays[-1]
    i, row, head = (pl.program_id(axis) for axis in range(3))
    of_queries = inputs.of_queries(static, row, i, head)

    def visit(j, d_q):
        k, v = inputs.of_keys(static, row, j, head)
        _, d_s = _gradients(static, inputs, row, head, i, j, of_queries, (k, v))
        return d_q + _dot(d_s.astype(k.dtype), k, 1, 0)

    at = row * pl.num_programs(0) + i
    zeros = jnp.zeros((static.block_queries, d_queries.shape[-1]), jnp.float32)
    d_q = jax.lax.fori_loop(ranges[0, at], ranges[1, at], visit, zeros)
    _store(static, d_queries, row, i, head, d_q)


def _keys_kernel(static, ranges, *arrays):
    inputs, (d_keys, d_values) = _Inputs(*arrays[:-2]), arrays[-2:]
    j, row, head = (pl.program_id(axis) for axis in range(3))
    of_keys = inputs.of_keys(static, row, j, head)

    def visit(i, carry):
        d_k, d_v = carry
        q, d_o, *_ = of_queries = inputs.of_queries(static, row, i, head)
        kept, d_s = _gradients(static, inputs, row, head, i, j, of_queries, of_keys)
        d_k += _dot(d_s.astype(q.dtype), q, 0, 0)
        return d_k, d_v + _dot(kept.astype(d_o.dtype), d_o, 0, 0)

    at = row * pl.num_programs(0) + j
    zeros = jnp.zeros((static.block_keys, d_keys.shape[-1]), jnp.float32)
    d_k, d_v = jax.lax.fori_loop(ranges[0, at], ranges[1, at], visit, (zeros, zeros))
    _store(static, d_keys, row, j, head, d_k)
    _store(static, d_values, row, j, head, d_v / (1.0 - static.dropout_rate))


def _bias_kernel(static, num_rows, query_blocks, ranges, *arrays):
    """Sums ds over this split's rows and over the pairs of blocks at this offset."""
    inputs, sums = _Inputs(*arrays[:-1]), arrays[-1]
    place, split, head = (pl.program_id(axis) for axis in range(3))
    splits = pl.num_programs(1)
    offset = place - (query_blocks - 1)  # key block minus query block

    def visit(number, total):
        row = split + jax.lax.div(number, jnp.int32(query_blocks)) * splits
        i = jax.lax.rem(number, jnp.int32(query_blocks))
        at = row * query_blocks + i
        meets = (i + offset >= ranges[0, at]) & (i + offset < ranges[1, at])

        def add(total):
            j = i + offset
            blocks = inputs.of_queries(static, row, i, head), inputs.of_keys(static, row, j, head)
            return total + _gradients(static, inputs, row, head, i, j, *blocks)[1]

        return jax.lax.cond(meets, add, lambda total: total, total)

    rows = jax.lax.div(num_rows - 1 - split, jnp.int32(splits)) + 1
    zeros = jnp.zeros(sums.shape[-2:], jnp.float32)
    sums[split, head, place, :, :] = jax.lax.fori_loop(0, rows * query_blocks, visit, zeros)


def _scores(static, row, head, i, j, q, k, bias, query_segments, key_segments):
    """Masked scores over log 2, [q, n], of the i-th block of queries and the j-th of keys."""
    s = _dot(q, k, 1, 1)
    query, key = _positions(static, i)[:, None], _positions(static, j)[None, :]
    if bias is not None:
        s = s + bias[head, key - query + (query_segments.shape[1] - 1)]
    its_segment = query_segments[row, _span(static, i)][:, None]
    is_seen = its_segment == key_segments[row, _span(static, j)][None, :]
    if static.is_causal:
        is_seen &= key <= query
    return jnp.where(is_seen, s * math.log2(math.e), MASKED)


def _is_kept(static, words, row, head, i, j):
    """What dropout keeps of a block's weights, [q, n] bool."""
    query = jnp.arange(static.block_queries, dtype=jnp.uint32)[:, None]
    key = jnp.arange(static.block_keys, dtype=jnp.uint32)[None, :]
    return weights_kept(static, words, row, head, i, j, query, key)


def _sum_diagonals(sums):
    """[H, offsets, q, n], blocks by offset, to their sums by distance: [H, Q + N - 1]."""
    heads, offsets, block, _ = sums.shape
    # Rows of 2n - 1, the zeros first, read as rows of 2n: equal distances then lie in a column.
    rows = jnp.pad(sums, ((0, 0), (0, 0), (0, 0), (block - 1, 0))).reshape(heads, offsets, -1)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, block))).reshape(heads, offsets, block, 2, block)
    low, high = jnp.moveaxis(rows.sum(2), 2, 0)  # each [H, offsets, n]; neighbours overlap
    distances = jnp.pad(low, ((0, 0), (0, 1), (0, 0))) + jnp.pad(high, ((0, 0), (1, 0), (0, 0)))
    return distances.reshape(heads, -1)[:, :-1]


def _span(static, index):
    return pl.ds(index * static.block_queries, static.block_queries)


def _load(static, array, row, index, head):
    """A block of one head's rows, [n, K]; zeros behind the array's end."""
    block = array.at[row, _span(static, index), head, :]
    if array.shape[1] % static.block_queries == 0:
        return block[...]
    return pltriton.load(block, mask=_is_inside(static, array, index), other=0)


def _store(static, array, row, index, head, values):
    block, values = array.at[row, _span(static, index), head, :], values.astype(array.dtype)
    if array.shape[1] % static.block_queries == 0:
        block[...] = values
    else:
        pltriton.store(block, values, mask=_is_inside(static, array, index))


def _is_inside(static, array, index):
    """Which rows of a block the array [B, N, H, K] has: [n, K] bool."""
    is_inside = _positions(static, index) < array.shape[1]
    return jnp.broadcast_to(is_inside[:, None], (static.block_queries, array.shape[3]))


def _positions(static, index):
    """Of a block's queries or keys, [n] int32."""
    return index * static.block_queries + jnp.arange(static.block_queries, dtype=jnp.int32)


def _dot(a, b, a_contracted: int, b_contracted: int):
    """A product of matrices over these dimensions, summed in float32."""
    return jax.lax.dot_general(
        a,
        b,
        (((a_contracted,), (b_contracted,)), ((), ())),
        precision="highest" if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
