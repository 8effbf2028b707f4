"""The GPU's kernels as Triton compiles them, which no other test runs.

JAX_PLATFORMS=cuda,cpu python -m pytest tests/core/test_on_gpu.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dslt.core import attention
from dslt.core.flash_attention import flash_attention

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="no GPU here, or JAX_PLATFORMS does not name it"
)

ROWS, HEADS, HEAD_DIM, RATE = 4, 12, 64, 0.1
CASES = {"encoder": (264, 264, False), "decoder": (136, 136, True), "cross": (136, 264, False)}
# Of the largest entry: other orders of sums; products rounded to 8 bits.
TOLERANCES = {"float32": 2e-5, "bfloat16": 2e-2}


def make_inputs(num_queries: int, num_keys: int, dtype: str):
    """Queries, keys, values, bias (of self-attention) and the result's gradient; segment ids."""
    rng = np.random.default_rng(0)
    lengths = num_queries, num_keys, num_keys, num_queries
    queries, keys, values, d_out = (
        jnp.asarray(rng.normal(size=(ROWS, length, HEADS, HEAD_DIM)) / 4, dtype)
        for length in lengths
    )
    is_self = num_queries == num_keys
    bias = jnp.asarray(rng.normal(size=(HEADS, 2 * num_keys - 1)), jnp.float32) if is_self else None
    segments = tuple(
        np.minimum(np.arange(length) // (length // 4) + 1, 4).astype(np.int32)[None]
        * (np.arange(length) < length - 5 * np.arange(ROWS)[:, None])
        for length in (num_queries, num_keys)
    )
    d_out *= (segments[0] > 0)[..., None, None]
    return (queries, keys, values, bias), d_out, segments


def results(attend, inputs, d_out):
    """The result and the gradients of what was given."""

    @jax.jit
    def run(inputs):
        out, pull_back = jax.vjp(attend, *inputs)
        return out, pull_back(d_out.astype(out.dtype))

    return jax.device_get(run(inputs))


@pytest.mark.parametrize("rate", [0.0, RATE])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("case", CASES)
def test_compiled_kernels_give_the_numbers_of_plain_attention(case, dtype, rate):
    """Result and all gradients, the same weights dropped; run twice, the same bits."""
    num_queries, num_keys, is_causal = CASES[case]
    inputs, d_out, segments = make_inputs(num_queries, num_keys, dtype)
    is_real = (segments[0] > 0)[..., None, None]
    key = jax.random.key(5) if rate else None

    def plain(queries, keys, values, bias):
        bias = None if bias is None else attention.expand_bias(bias, num_queries)
        mask = attention.SegmentMask(*segments, is_causal).expand()
        out = attention.plain_attention(queries, keys, values, bias, mask, rate, key)
        return jnp.where(is_real, out, 0)

    def flash(queries, keys, values, bias):
        return flash_attention(
            queries, keys, values, bias, *segments,
            is_causal=is_causal, dropout_rate=rate, dropout_key=key, platform="gpu",
        )  # fmt: skip

    wide = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    with jax.default_matmul_precision("highest"):
        expected = results(plain, wide, d_out)
    found, again = (results(flash, inputs, d_out) for _ in range(2))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape
        error = np.abs(one.astype(np.float32) - other).max() / np.abs(other).max()
        print(f"{case} {dtype} {rate} {one.shape}: {error:.2g} of the largest")
        assert error < TOLERANCES[dtype]
