"""The model's invariances: packing, padding, causality, dtype, remat, dropout, buckets."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dslt.core import t5
from dslt.core.batch import PAD_ID, ROLE_LABEL, ROLE_RATIONALE, pad_rows

SHAPE = {
    "vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 2, "num_layers": 3,
    "num_decoder_layers": 2, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}  # fmt: skip
FAST_COMPILE = {"xla_backend_optimization_level": 0}
FIRST = (np.arange(3, 10), np.array([7, 5, 30, 1]), ROLE_LABEL)
SECOND = (np.arange(20, 25), np.array([12, 13, 14, 15, 16, 1]), ROLE_LABEL)
ONE_KIND_OF_BIAS = pytest.mark.parametrize("student", [True], indirect=True)  # for time's sake
FLOAT32_SUMS = 2e-5  # sums over more masked zeros, taken in another order; logits are near 1


@pytest.fixture(scope="module", params=[False, True], ids=["bias_shared", "bias_per_layer"])
def student(request):
    """(config, params), with biases large enough to matter."""
    config = t5.T5Config(**SHAPE, relative_bias_per_layer=request.param)
    params = t5.init_params(config, seed=0)[1]
    scaled = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 4 * leaf if path[-2:-1] and path[-2].key == "relative_bias" else leaf,
        params,
    )
    return config, scaled


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILE)
def forward(config: t5.T5Config, params: dict, batch, key=None):
    """Teacher-forced logits."""
    return nnx.merge(t5.abstract_params(config)[0], params)(batch, key)


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILE)
def gradient(config: t5.T5Config, params: dict, batch, key=None):
    """Of a sum over target tokens that every logit has a part in."""

    def loss(params):
        logits = nnx.merge(t5.abstract_params(config)[0], params)(batch, key)
        return (jnp.square(logits).mean(-1) * batch.decoder_loss_weights).sum()

    return jax.grad(loss)(params)


def run(config: t5.T5Config, params: dict, batch, key=None) -> np.ndarray:
    return np.asarray(forward(config, params, batch, key))


def test_packing_changes_nothing(student, build_batch):
    config, params = student
    packed = run(config, params, build_batch([[FIRST, SECOND]], 16, 12))
    apart = run(config, params, build_batch([[FIRST], [SECOND]], 16, 12))
    np.testing.assert_allclose(packed[0, :4], apart[0, :4], atol=FLOAT32_SUMS)
    np.testing.assert_allclose(packed[0, 4:10], apart[1, :6], atol=FLOAT32_SUMS)


def test_order_in_the_row_changes_nothing(student, build_batch):
    config, params = student
    one = run(config, params, build_batch([[FIRST, SECOND]], 16, 12))
    other = run(config, params, build_batch([[SECOND, FIRST]], 16, 12))
    np.testing.assert_allclose(one[0, :4], other[0, 6:10], atol=FLOAT32_SUMS)


def test_row_lengths_and_padding_rows_change_nothing(student, build_batch):
    config, params = student
    tight = run(config, params, build_batch([[FIRST]], 7, 4))
    wide = run(config, params, pad_rows(build_batch([[FIRST]], 16, 12), 4))
    no_source_padding = run(config, params, build_batch([[FIRST]], 7, 12))
    np.testing.assert_allclose(tight[0], wide[0, :4], atol=FLOAT32_SUMS)
    np.testing.assert_allclose(tight[0], no_source_padding[0, :4], atol=FLOAT32_SUMS)
    assert np.isfinite(no_source_padding).all()  # its padded targets have no key at all
    assert np.isfinite(wide).all()


@ONE_KIND_OF_BIAS
def test_gradients_of_padding_rows_are_finite_and_add_nothing(student, build_batch):
    config, params = student
    batch = build_batch([[FIRST, SECOND]], 12, 12)  # padding of targets alone sees no key
    padded_batch = pad_rows(batch, 2)
    alone, padded = (gradient(config, params, rows) for rows in (batch, padded_batch))
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(padded), strict=True):
        np.testing.assert_allclose(one, other, atol=FLOAT32_SUMS * max(1, np.abs(one).max()))


@ONE_KIND_OF_BIAS
def test_gradients_reach_only_the_past_and_the_own_segment(student, build_batch):
    """From one logit back to every position's embedding, on both sides."""
    config, params = student
    graphdef = t5.abstract_params(config)[0]
    batch = build_batch([[FIRST, SECOND]], 16, 12)

    def logit_of(embedded, position):
        model = nnx.merge(graphdef, params)
        model.embed = lambda tokens: embedded
        return model(batch)[0, position].sum()

    embedded = np.random.default_rng(0).normal(size=(1, 16 + 12, 16)).astype(np.float32)
    reach = jax.jit(jax.grad(logit_of), compiler_options=FAST_COMPILE)
    for position, own_sources, own_targets in (
        (2, range(7), range(3)),
        (6, range(7, 12), range(4, 7)),
    ):
        reached = np.flatnonzero(np.abs(reach(embedded, position)[0]).sum(-1))
        own = [*own_sources, *(16 + place for place in own_targets)]
        np.testing.assert_array_equal(reached, own)


def test_two_targets_of_one_source_do_not_see_each_other(student, build_batch):
    """The shared encoder's form, one segment of two roles, equals two segments with the source."""
    config, params = student
    source, label, rationale = [5, 6, 7], [8, 9, 1], [10, 11, 12, 1]
    apart = build_batch(
        [[(source, label, ROLE_LABEL)], [(source, rationale, ROLE_RATIONALE)]], 4, 8
    )
    together = build_batch([[(source, label + rationale, ROLE_LABEL)]], 4, 8)
    together.decoder_loss_roles[0, 3:7] = ROLE_RATIONALE
    together.decoder_input_tokens[0, 3] = PAD_ID
    expected, found = run(config, params, apart), run(config, params, together)
    np.testing.assert_allclose(found[0, :3], expected[0, :3], atol=FLOAT32_SUMS)
    np.testing.assert_allclose(found[0, 3:7], expected[1, :4], atol=FLOAT32_SUMS)


@ONE_KIND_OF_BIAS
def test_remat_and_unrolling_change_nothing(student, build_batch):
    config, params = student
    batch, key = build_batch([[FIRST, SECOND]], 16, 12), jax.random.key(1)
    plain = gradient(config, params, batch, key)
    changed = gradient(dataclasses.replace(config, remat=True, scan_unroll=2), params, batch, key)
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(changed), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(one).max())


def test_bfloat16_is_near_float32(student, build_batch):
    config, params = student
    batch = build_batch([[FIRST, SECOND]], 16, 12)
    exact = run(config, params, batch)
    rounded = run(dataclasses.replace(config, dtype="bfloat16"), params, batch)
    assert rounded.dtype == np.float32
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.05  # 8 bits: 2**-9 a rounding, some tens of them in a row


def test_float16_is_refused():
    with pytest.raises(ValueError, match="float16"):
        t5.T5Config(dtype="float16")


def test_dropout_follows_its_key(build_batch):
    config = t5.T5Config(**SHAPE)
    params = t5.init_params(config, seed=0)[1]
    batch = build_batch([[FIRST, SECOND]], 16, 12)
    plain = run(config, params, batch)
    once, again = (run(config, params, batch, jax.random.key(7)) for _ in range(2))
    other = run(config, params, batch, jax.random.key(8))
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - other).max() > 0.1
    assert np.abs(once - plain).max() > 0.1
    off = dataclasses.replace(config, dropout_rate=0.0)
    np.testing.assert_array_equal(run(off, params, batch, jax.random.key(7)), plain)


def test_dropout_keeps_the_mean():
    dropped = t5.dropout(jnp.ones((100, 1000)), 0.25, jax.random.key(0))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert dropped.mean() == pytest.approx(1.0, abs=0.01)  # 5 standard errors


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_the_norms_gradient_is_that_of_its_formula_and_keeps_its_input_alone(dtype, tolerance):
    rng = np.random.default_rng(0)
    x, d_out = (jnp.asarray(rng.normal(size=(4, 6, 16)), dtype) for _ in range(2))
    scale = jnp.asarray(rng.normal(size=16), jnp.float32)

    def formula(x, scale):
        return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale

    wide = [array.astype(jnp.float32) for array in (x, d_out)]
    expected, pull_back = jax.vjp(formula, wide[0], scale)
    found, written_out = jax.vjp(lambda *inputs: t5._rms_norm(*inputs, 1e-6), x, scale)
    assert found.dtype == dtype
    pairs = zip((found, *written_out(d_out)), (expected, *pull_back(wide[1])), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())
    kept = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(written_out)}
    assert kept == {(x.shape, x.dtype), ((4, 6, 1), scale.dtype), (scale.shape, scale.dtype)}


def test_tied_output_uses_the_embedding_with_its_scale(build_batch):
    batch = build_batch([[FIRST]], 7, 4)
    tied = t5.T5Config(**SHAPE, tie_word_embeddings=True, scale_decoder_outputs=True)
    params = t5.init_params(tied, seed=0)[1]
    untied = t5.T5Config(**SHAPE)
    head = params["token_embedding"].T * SHAPE["d_model"] ** -0.5
    np.testing.assert_allclose(
        run(tied, params, batch), run(untied, {**params, "lm_head": head}, batch), atol=1e-5
    )


def test_bucket_values():
    """32 buckets to distance 128: by hand from floor(8 + 8·log(d/8)/log(16)) on each side."""
    distances = np.array([0, -1, -7, -8, -12, -16, -64, -128, -999, 1, 7, 8, 16, 999], np.int32)
    found = t5.relative_position_bucket(distances, True, 32, 128)
    np.testing.assert_array_equal(found, [0, 1, 7, 8, 9, 10, 14, 15, 15, 17, 23, 24, 26, 31])
    causal = t5.relative_position_bucket(distances, False, 32, 128)
    np.testing.assert_array_equal(causal, [0, 1, 7, 8, 12, 16, 26, 31, 31, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    ("num_buckets", "max_distance"), [(32, 128), (32, 256), (8, 20), (16, 64), (64, 128), (12, 50)]
)
def test_buckets_are_those_of_transformers(num_buckets, max_distance, bidirectional):
    torch = pytest.importorskip("torch")
    modeling_t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distances = np.arange(-300, 301)
    arguments = (bidirectional, num_buckets, max_distance)
    expected = modeling_t5.T5Attention._relative_position_bucket(
        torch.from_numpy(distances), *arguments
    )
    found = t5.relative_position_bucket(distances.astype(np.int32), *arguments)
    np.testing.assert_array_equal(found, expected.numpy())
    assert found.dtype == jnp.int32


def test_causal_buckets_follow_the_formula():
    """The oracle without torch: the logarithm in float64, nudged over exact powers."""
    distance = np.arange(1, 3000)
    logarithmic = 16 + np.floor(np.log(distance / 16) / math.log(128 / 16) * 16 + 1e-9)
    expected = np.where(distance < 16, distance, np.minimum(logarithmic, 31))
    found = t5.relative_position_bucket(-distance.astype(np.int32), False, 32, 128)
    np.testing.assert_array_equal(found, expected)


def test_count_params_by_hand():
    config = t5.T5Config(**{**SHAPE, "num_layers": 1, "num_decoder_layers": 1})
    attention, feed_forward, norm = 4 * 16 * 8, 3 * 16 * 24, 16
    encoder = attention + feed_forward + 2 * norm + norm + 8 * 2
    decoder = 2 * attention + feed_forward + 3 * norm + norm + 8 * 2
    expected = encoder + decoder + 2 * 40 * 16
    assert t5.count_params(t5.abstract_params(config)[1]) == expected
    assert t5.count_params(t5.init_params(config, 0)[1]) == expected
