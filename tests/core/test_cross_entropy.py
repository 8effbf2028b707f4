"""The chunked cross-entropy against one that holds all logits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dslt.core import sharding
from dslt.core.cross_entropy import linear_cross_entropy
from dslt.core.sharding import MeshConfig

ROWS, TARGETS, WIDTH, VOCAB = 4, 10, 8, 24
FLOAT32_SUMS = 1e-6  # gradients here are near 0.1, summed in another order


@pytest.fixture(scope="module")
def arrays():
    """Hidden states, weight, targets, weights of which some are zero."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(ROWS, TARGETS, WIDTH)).astype(np.float32)
    weight = rng.normal(size=(WIDTH, VOCAB)).astype(np.float32)
    targets = rng.integers(VOCAB, size=(ROWS, TARGETS)).astype(np.int32)
    token_weights = rng.uniform(size=(ROWS, TARGETS)) * (rng.uniform(size=(ROWS, TARGETS)) > 0.3)
    return hidden, weight, targets, token_weights.astype(np.float32)


def with_all_logits(hidden, weight, targets, token_weights):
    logits = jnp.matmul(hidden, weight)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return (nll * token_weights).sum(), (nll, logits.argmax(-1) == targets)


def chunked(chunk_tokens: int):
    def loss(*arrays):
        value, *tokens = linear_cross_entropy(*arrays, chunk_tokens)
        return value, tuple(tokens)

    return loss


def value_and_gradients(loss, arrays, mesh=None):
    gradient = jax.value_and_grad(loss, argnums=(0, 1, 3), has_aux=True)

    def inside_mesh(*arrays):
        with sharding.inside(mesh):
            return gradient(*arrays)

    return jax.jit(inside_mesh, in_shardings=mesh and placements(mesh, arrays[1]))(*arrays)


def placements(mesh, weight):
    """Of hidden, weight, targets and token weights."""
    rows = sharding.batch_sharding(mesh)
    return rows, sharding.state_shardings(mesh, {"lm_head": weight})["lm_head"], rows, rows


def assert_same(found, expected, tolerance=FLOAT32_SUMS):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=tolerance), found, expected
    )


@pytest.mark.parametrize("chunk_tokens", [1, 7, 16, 40, 512])
def test_equals_the_cross_entropy_of_all_logits(arrays, chunk_tokens):
    """Value, tokens and all gradients; 40 tokens in chunks that do and do not divide them."""
    expected = value_and_gradients(with_all_logits, arrays)
    assert_same(value_and_gradients(chunked(chunk_tokens), arrays), expected)


def test_without_gradients_the_values_are_the_same(arrays):
    assert_same(chunked(16)(*arrays), with_all_logits(*arrays))


def test_gradient_scales_with_what_follows(arrays):
    """The loss is differentiated as a factor in something larger."""
    scaled = [
        jax.grad(lambda h, loss=loss: 3.0 * loss(h, *arrays[1:])[0] ** 2)(arrays[0])
        for loss in (chunked(16), with_all_logits)
    ]
    np.testing.assert_allclose(*scaled, rtol=1e-5, atol=1e-4)  # the loss is near 50


def test_large_logits_do_not_overflow(arrays):
    hidden, *others = arrays
    (loss, _), gradients = value_and_gradients(chunked(16), (1e4 * hidden, *others))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((loss, gradients)))


def test_bfloat16_is_near_float32(arrays):
    """Operands are rounded to 8 bits, sums are not."""
    hidden, *others = arrays
    narrow = value_and_gradients(chunked(16), (jnp.asarray(hidden, jnp.bfloat16), *others))
    (loss, _), (d_hidden, d_weight, _) = narrow
    (expected, _), gradients = value_and_gradients(chunked(16), arrays)
    np.testing.assert_allclose(loss, expected, rtol=2e-2)
    assert d_hidden.dtype == jnp.bfloat16 and d_weight.dtype == jnp.float32
    np.testing.assert_allclose(d_hidden.astype(np.float32), gradients[0], atol=3e-2)
    np.testing.assert_allclose(d_weight, gradients[1], atol=6e-2)


MESHES = [MeshConfig(4, 1, 1), MeshConfig(2, 2, 1), MeshConfig(1, 4, 2), MeshConfig(2, 1, 4)]


@pytest.mark.parametrize("config", MESHES, ids=str)
@pytest.mark.parametrize("vocab", [VOCAB, VOCAB - 1])  # 23 columns cannot be split
def test_sharded_equals_one_device(arrays, config, vocab):
    hidden, weight, targets, token_weights = arrays
    arrays = hidden, weight[:, :vocab], targets % vocab, token_weights
    size = config.data * config.fsdp * config.tensor
    mesh = sharding.make_mesh(config, jax.devices()[:size])
    found = value_and_gradients(chunked(3), arrays, mesh)
    assert_same(found, value_and_gradients(with_all_logits, arrays))


def test_the_weight_crosses_the_mesh_once(arrays):
    """However many chunks there are: one gather over fsdp and one reduction of the gradient."""
    mesh = sharding.make_mesh(MeshConfig(2, 4, 1))
    hidden, weight, targets, token_weights = arrays
    hidden, targets, token_weights = (
        np.tile(x, (2, 1, 1)[: x.ndim]) for x in (hidden, targets, token_weights)
    )

    def gradients(*arrays):
        with sharding.inside(mesh):
            return jax.grad(lambda *x: chunked(1)(*x)[0], argnums=(0, 1))(*arrays)

    where = placements(mesh, weight)
    compiled = jax.jit(gradients, in_shardings=where, out_shardings=where[:2])
    text = compiled.lower(hidden, weight, targets, token_weights).compile().as_text()
    assert len(re.findall(r" all-gather(?:-start)?\(", text)) == 1
    assert len(re.findall(r" reduce-scatter(?:-start)?\(", text)) == 1
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == 1  # over data
    assert not re.search(r"all-to-all|collective-permute", text)


def test_no_buffer_holds_all_logits(arrays):
    compiled = jax.jit(jax.grad(lambda *x: chunked(8)(*x)[0], argnums=(0, 1))).lower(*arrays)
    sizes = [
        int(np.prod([int(n) for n in dims.split(",")]))
        for dims in re.findall(r"f32\[([\d,]+)\]", compiled.compile().as_text())
    ]
    assert max(sizes) < ROWS * TARGETS * VOCAB
