"""Attention by implementation, over queries, keys and values that are projected already.

    plain      everywhere: scores [B, H, Q, N] in memory, softmax in float32
    flash      TPUs: Pallas kernels without them (flash_attention.py); the same numbers and dropout
    flash_gpu  NVIDIA GPUs: the same
    cudnn      NVIDIA GPUs: cuDNN's fused attention; the same numbers, no dropout of the weights

The relative-position bias comes from t5.py by distance, [H, Q + N - 1]; the kernels take it so, the
others take it expanded (`bias_form`), once for all layers that share it. Letters as in t5.py.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dslt.core.dropout import dropout
from dslt.core.flash_attention import flash_attention
from dslt.core.products import einsum, swap_heads
from dslt.errors import InputError

IMPLEMENTATIONS = ("plain", "flash", "flash_gpu", "cudnn")
FLASH_PLATFORMS = {"flash": "tpu", "flash_gpu": "gpu"}
MASKED = -1e9  # finite, so that a row of padding has a softmax too


class SegmentMask(NamedTuple):
    """Who sees whom in packed rows: a query the keys of its own segment, of the past if causal."""

    query_segments: jax.Array  # [B, Q] int32, 0 is padding
    key_segments: jax.Array  # [B, N] int32
    is_causal: bool

    def expand(self):
        """[B, 1, Q, N] bool. Padding sees padding."""
        mask = self.query_segments[:, None, :, None] == self.key_segments[:, None, None, :]
        if self.is_causal:
            query, key = (jax.lax.broadcasted_iota(jnp.int32, mask.shape, axis) for axis in (2, 3))
            mask &= query >= key
        return mask


def attend(
    implementation: str,
    queries,
    keys,
    values,
    bias,
    mask: SegmentMask,
    *,
    dropout_rate: float = 0.0,
    dropout_key=None,
):
    """softmax(queries·keysᵀ + bias)·values under the mask; scores are not scaled.

    Args:
      queries: [B, Q, H, K].
      keys, values: [B, N, H, K].
      bias: as `bias_form` makes it, or None.
      mask: a SegmentMask. Padding's results are finite and otherwise not defined.
      dropout_key: of dropout on the softmax's weights; None turns it off.

    Returns:
      [B, Q, H, K].
    """
    if implementation in FLASH_PLATFORMS:
        return flash_attention(
            queries,
            keys,
            values,
            bias,
            mask.query_segments,
            mask.key_segments,
            is_causal=mask.is_causal,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
            platform=FLASH_PLATFORMS[implementation],
        )
    if implementation == "cudnn":
        return fused_attention(queries, keys, values, bias, mask.expand())
    return plain_attention(queries, keys, values, bias, mask.expand(), dropout_rate, dropout_key)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def plain_attention(queries, keys, values, bias, mask, dropout_rate=0.0, dropout_key=None):
    """As `attend`, with bias [1, H, Q, N] and mask [B, 1, Q, N] bool.

    Its gradient is written out, for products in float32 of narrow operands (products.py) and for
    fewer passes over the scores: softmax's own takes the sum of weights times their gradients, a
    number a query, and that is also the sum of results times theirs.

    Source: Dao et al. 2022 (arXiv 2205.14135), equation 4.
    """
    arguments = queries, keys, values, bias, mask, dropout_rate, dropout_key
    return _plain_forward(*arguments)[0]


def _plain_forward(queries, keys, values, bias, mask, dropout_rate, dropout_key):
    dtype = values.dtype
    q, n, arrange = _layout(dtype)
    queries, keys, values = map(arrange, (queries, keys, values))
    scores = einsum(f"{q},{n}->bhqn", queries, keys)
    if bias is not None:
        scores = scores + bias
    weights = jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1)
    dropped = dropout(weights, dropout_rate, dropout_key).astype(dtype)
    mixed = arrange(einsum(f"bhqn,{n}->{q}", dropped, values, dtype))
    has_bias = None if bias is None else ()
    return mixed, (queries, keys, values, has_bias, weights.astype(dtype), dropped, mixed)


def _plain_backward(dropout_rate, saved, d_mixed):
    queries, keys, values, has_bias, weights, dropped, mixed = saved
    dtype = queries.dtype
    q, n, arrange = _layout(dtype)
    of_query = (d_mixed.astype(jnp.float32) * mixed).sum(-1).swapaxes(1, 2)[..., None]
    d_mixed = arrange(d_mixed)
    d_values = einsum(f"bhqn,{q}->{n}", dropped, d_mixed, dtype)
    d_dropped = einsum(f"{q},{n}->bhqn", d_mixed, values)
    d_scores = d_dropped * dropped - of_query * weights  # [B, H, Q, N] float32; 0 where masked
    d_bias = None if has_bias is None else _sum(d_scores, axis=0)[None]
    d_scores = d_scores.astype(dtype)
    d_queries = einsum(f"bhqn,{n}->{q}", d_scores, keys, dtype)
    d_keys = einsum(f"bhqn,{q}->{n}", d_scores, queries, dtype)
    return *map(arrange, (d_queries, d_keys, d_values)), d_bias, None, None


plain_attention.defvjp(_plain_forward, _plain_backward)


def _layout(dtype):
    """Axes of queries and of keys in products, and what brings [B, N, H, K] there and back.

    With heads before positions each head is one matrix: on a CPU, products of those are up to twice
    as fast in float32, and in bfloat16 not worth the copy.
    """
    if dtype == jnp.float32:
        return "bhqk", "bhnk", swap_heads
    return "bqhk", "bnhk", lambda x: x


def _sum(x, axis: int):
    """`x.sum(axis)` in float32, by a product with ones.

    As a plain sum, XLA's CPU backend fuses it with all that follows, down to the bias by distance,
    on one core: a tenth of a small model's step.
    """
    ones = jnp.ones(x.shape[axis], x.dtype)
    return jnp.tensordot(ones, x, axes=((0,), (axis,)), precision="highest")


def cached_attention(queries, keys, values, bias, mask):
    """One new position over cached ones, whose heads lie before positions.

    Args:
      queries: [B, Q, H, K].
      keys, values: [B, H, N, K].
      bias: [1, H, 1, N] float32 or None.
      mask: [B, 1, Q, N] bool.

    Returns:
      [B, Q, H, K].
    """
    scores = einsum("bqhk,bhnk->bhqn", queries, keys)
    if bias is not None:
        scores = scores + bias
    weights = jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1).astype(values.dtype)
    return einsum("bhqn,bhnk->bqhk", weights, values, values.dtype)


def fused_attention(queries, keys, values, bias, mask, implementation: str = "cudnn"):
    """As `plain_attention` without dropout, by `jax.nn.dot_product_attention`.

    cuDNN takes one additive array, so bias and mask together are [B, H, Q, N] in memory, in the
    type of the queries; the scores and their gradients are not.
    """
    if bias is not None:
        bias = bias.astype(queries.dtype)
    return jax.nn.dot_product_attention(
        queries, keys, values, bias, mask, scale=1.0, implementation=implementation
    )


def bias_form(implementation: str, bias, num_queries: int):
    """A bias by distance [H, Q + N - 1] in the form that `attend` takes."""
    return bias if implementation in FLASH_PLATFORMS else expand_bias(bias, num_queries)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def expand_bias(bias, num_queries: int):
    """[H, Q + N - 1], entry d of key minus query position d - (Q - 1), to [1, H, Q, N].

    Each row is the one above, one to the right. Written without a gather: the vector repeated Q
    times, cut into rows that are one shorter than its period.
    """
    heads, length = bias.shape
    period = jnp.pad(bias, ((0, 0), (0, 1)))
    rows = jnp.tile(period, num_queries)[:, : num_queries * length]
    rows = rows.reshape(heads, num_queries, length)
    return rows[None, :, :, num_queries - 1 :]


def _expand_bias_forward(bias, num_queries):
    return expand_bias(bias, num_queries), None


def _expand_bias_backward(num_queries, _, d_expanded):
    """The way back: rows that are one longer, so that equal distances lie in a column."""
    _, heads, _, num_keys = d_expanded.shape
    length = num_queries + num_keys - 1
    rows = jnp.pad(d_expanded[0], ((0, 0), (0, 0), (num_queries - 1, 0)))
    rows = jnp.pad(rows.reshape(heads, num_queries * length), ((0, 0), (0, num_queries)))
    rows = rows.reshape(heads, num_queries, length + 1)
    return (_sum(rows, axis=1)[:, :length],)


expand_bias.defvjp(_expand_bias_forward, _expand_bias_backward)


def check_settings(implementation: str, dtype: str, head_dim: int, dropout_rate: float) -> None:
    """Raises InputError where T5Config's fields do not go with its `attention`."""
    if implementation not in IMPLEMENTATIONS:
        raise InputError(
            f"T5Config.attention is {implementation!r}; expected one of {IMPLEMENTATIONS}"
        )
    if implementation == "flash_gpu" and head_dim not in (16, 32, 64, 128):
        raise InputError(
            f"T5Config.attention is 'flash_gpu' and T5Config.d_kv {head_dim}; its kernels take 16, "
            "32, 64 or 128: set T5Config.attention = 'plain'"
        )
    if implementation != "cudnn":
        return
    if dropout_rate > 0:
        raise InputError(
            f"T5Config.attention is 'cudnn', which has no dropout of attention weights, but their "
            f"rate is {dropout_rate}; set T5Config.attention_dropout_rate = 0.0 (other dropout "
            "stays), or T5Config.attention = 'plain'"
        )
    if dtype != "bfloat16":
        raise InputError(
            f"T5Config.attention is 'cudnn' and T5Config.dtype {dtype!r}; cuDNN takes 16-bit types "
            "alone: set T5Config.dtype = 'bfloat16'"
        )
    if head_dim % 8 or head_dim > 128:
        raise InputError(
            f"T5Config.attention is 'cudnn' and T5Config.d_kv {head_dim}; cuDNN takes a multiple "
            "of 8 up to 128: set T5Config.attention = 'plain'"
        )


def runs_on(implementation: str, platform: str) -> bool:
    """Whether devices of this platform (`cpu`, `gpu`, `tpu`) are what it is for."""
    homes = FLASH_PLATFORMS | {"cudnn": "gpu"}
    return homes.get(implementation, platform) == platform


def check_platform(implementation: str, platform: str) -> None:
    """Raises InputError where devices of this platform are not what it is for."""
    if not runs_on(implementation, platform):
        raise InputError(
            f"T5Config.attention is {implementation!r} and the devices are of platform "
            f"{platform!r}; 'flash' is for TPUs, 'flash_gpu' and 'cudnn' are for GPUs, and 'plain' "
            "runs everywhere"
        )
