"""The bias by distance, the fused form, and what is refused; flash has a file of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dslt.core import attention, t5
from dslt.core.dropout import dropout


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 5), (4, 4), (3, 6), (5, 1)])
def test_expanded_bias_is_constant_along_diagonals(num_queries, num_keys):
    by_distance = np.arange(2 * (num_queries + num_keys - 1), dtype=np.float32).reshape(2, -1)
    found, pull_back = jax.vjp(
        functools.partial(attention.expand_bias, num_queries=num_queries), by_distance
    )
    weights = np.random.default_rng(0).normal(size=found.shape).astype(np.float32)
    (gradient,) = pull_back(weights)
    expected, expected_gradient = np.zeros(found.shape), np.zeros(by_distance.shape)
    for query in range(num_queries):
        for key in range(num_keys):
            entry = key - query + num_queries - 1
            expected[0, :, query, key] = by_distance[:, entry]
            expected_gradient[:, entry] += weights[0, :, query, key]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)  # sums in another order


def test_bias_of_one_query_is_its_row_of_the_whole():
    config = t5.T5Config(d_model=8, num_heads=2, relative_attention_num_buckets=8)
    for bidirectional in (True, False):
        bias = t5.RelativeBias(config, bidirectional, t5.nnx.Rngs(0))
        whole = bias(40)
        for index in (0, 17, 39):
            row = bias.to_keys(jnp.arange(40) - index)
            np.testing.assert_array_equal(row, whole[:, :, index : index + 1])
        assert len(np.unique(whole)) > 8  # distances do differ


def test_the_fused_form_gives_the_numbers_of_plain():
    """`jax.nn.dot_product_attention` as `cudnn` calls it, computed by XLA: there is no GPU here."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(2, 9, 3, 8)).astype(np.float32) for _ in range(4)]
    *arrays, d_out = arrays
    bias = rng.normal(size=(3, 17)).astype(np.float32)
    segments = np.repeat([1, 2, 3], 3)[None].repeat(2, 0)
    for is_causal in (False, True):
        mask = attention.SegmentMask(segments, segments, is_causal).expand()

        def by(attend, queries, keys, values, bias, mask=mask):
            mixed = attend(queries, keys, values, attention.expand_bias(bias, 9), mask)
            return (mixed * d_out).sum(), mixed

        fused = functools.partial(attention.fused_attention, implementation="xla")
        results = [
            jax.jit(jax.grad(functools.partial(by, attend), (0, 1, 2, 3), has_aux=True))(
                *arrays, bias
            )
            for attend in (attention.plain_attention, fused)
        ]
        for expected, found in zip(*map(jax.tree.leaves, results), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("dropout_rate", [0.0, 0.3])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_written_gradient_is_that_of_the_formula(dropout_rate, has_bias):
    """Of queries, keys, values and bias, beside autodiff of softmax; rows of one key included."""
    rng = np.random.default_rng(0)
    shapes = [(2, 5, 3, 4), (2, 6, 3, 4), (2, 6, 3, 4), (1, 3, 5, 6)]
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    arrays[3:] = arrays[3:] if has_bias else []
    mask = rng.random((2, 1, 5, 6)) < 0.5
    mask[:, :, 0] = np.arange(6) == 2
    d_mixed = rng.normal(size=shapes[0]).astype(np.float32)
    key = jax.random.key(1)

    def by_formula(queries, keys, values, bias=0.0):
        scores = jnp.einsum("bqhk,bnhk->bhqn", queries, keys) + bias
        weights = jax.nn.softmax(jnp.where(mask, scores, attention.MASKED))
        return jnp.einsum("bhqn,bnhk->bqhk", dropout(weights, dropout_rate, key), values)

    def written(queries, keys, values, bias=None):
        return attention.plain_attention(queries, keys, values, bias, mask, dropout_rate, key)

    (expected, pull_expected), (found, pull_found) = (
        jax.vjp(attend, *arrays) for attend in (by_formula, written)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for gradient, known in zip(pull_found(d_mixed), pull_expected(d_mixed), strict=True):
        np.testing.assert_allclose(gradient, known, atol=1e-5)


def test_cudnn_lowers_to_its_fused_kernels_for_a_gpu_that_is_not_there(monkeypatch):
    """Forward, and backward with the gradient of the bias. Lowered, not run."""
    private = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{private}.check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(f"{private}.check_compute_capability", lambda *_, **__: True)
    array = jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    bias = jax.ShapeDtypeStruct((4, 127), jnp.float32)

    def loss(queries, keys, values, bias, segments):
        mask = attention.SegmentMask(segments, segments, is_causal=True)
        bias = attention.bias_form("cudnn", bias, 64)
        return attention.attend("cudnn", queries, keys, values, bias, mask).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2, 3))).trace(array, array, array, bias, segments)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmax(" in program
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward(" in program
    scores = r"tensor<2x4x64x64xf32>"  # neither they nor their gradients
    assert scores not in program


def test_a_segment_mask_by_hand():
    mask = attention.SegmentMask(np.array([[1, 1, 2, 0]]), np.array([[1, 2, 2, 0]]), False)
    expected = [[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(mask.expand()[0, 0], expected)
    np.testing.assert_array_equal(mask._replace(is_causal=True).expand()[0, 0], np.tril(expected))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention": "splash"}, "'splash'; expected one of .*plain.*flash.*cudnn"),
        ({"attention": "cudnn"}, r"rate is 0.1; set T5Config.attention_dropout_rate = 0.0"),
        (
            {"attention": "cudnn", "dropout_rate": 0.0, "attention_dropout_rate": 0.2},
            "rate is 0.2",
        ),
        ({"attention": "cudnn", "attention_dropout_rate": 0.0}, "dtype = 'bfloat16'"),
        (
            {"attention": "cudnn", "dropout_rate": 0.0, "dtype": "bfloat16", "d_kv": 20},
            "d_kv 20; cuDNN takes a multiple of 8",
        ),
        ({"attention": "flash_gpu", "d_kv": 48}, "d_kv 48; its kernels take 16, 32, 64 or 128"),
        ({"attention_dropout_rate": 1.0}, "attention_dropout_rate is 1.0; expected 0 <= rate < 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        t5.T5Config(**fields)


def test_attention_weights_drop_at_their_own_rate():
    assert t5.T5Config(dropout_rate=0.2).weights_dropout_rate == 0.2
    own = t5.T5Config(
        attention="cudnn", attention_dropout_rate=0.0, dropout_rate=0.2, dtype="bfloat16"
    )
    assert (own.weights_dropout_rate, own.dropout_rate) == (0.0, 0.2)


@pytest.mark.parametrize(
    ("implementation", "home"),
    [("plain", None), ("flash", "tpu"), ("flash_gpu", "gpu"), ("cudnn", "gpu")],
)
def test_devices_that_it_is_not_for_are_refused(implementation, home):
    for platform in ("cpu", "gpu", "tpu"):
        if home in (platform, None):
            attention.check_platform(implementation, platform)
        else:
            with pytest.raises(ValueError, match=f"{implementation}.*{platform}.*plain"):
                attention.check_platform(implementation, platform)
