"""Looking up rows of a table, on one device and on several."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from dslt.core import sharding
from dslt.core.embedding import look_up
from dslt.core.sharding import MeshConfig

VOCAB, WIDTH = 24, 16
MESHES = [MeshConfig(8, 1, 1), MeshConfig(2, 4, 1), MeshConfig(1, 4, 2), MeshConfig(2, 1, 4)]


def make_arrays(vocab: int, width: int):
    """A table, tokens of which many are the same, and what the outcome is weighed by."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(vocab, width)).astype(np.float32)
    tokens = rng.integers(vocab, size=(8, 30)).astype(np.int32)
    tokens[:, :20] = 3
    return table, tokens, rng.normal(size=(8, 30, width)).astype(np.float32)


def gradient_function(config: MeshConfig | None, table, dtype):
    """Jitted: of the weighed sum, by the table; with the rows that were looked up."""
    mesh = config and sharding.make_mesh(config)

    def weighed(table, tokens, weights):
        with sharding.inside(mesh):
            rows = look_up(table, tokens, dtype)
        return (rows.astype(jnp.float32) * weights).sum(), rows

    gradient = jax.grad(weighed, has_aux=True)
    if not mesh:
        return jax.jit(gradient)
    rows = sharding.batch_sharding(mesh)
    spec = sharding.partition_spec(mesh, "token_embedding", shape=table.shape)
    where = NamedSharding(mesh, spec)
    return jax.jit(gradient, in_shardings=(where, rows, rows), out_shardings=(where, rows))


def expected_of(table, tokens, weights):
    d_table = np.zeros(table.shape, np.float64)
    np.add.at(d_table, tokens, weights)
    return d_table, table[tokens]


@pytest.mark.parametrize("config", [None, *MESHES], ids=str)
@pytest.mark.parametrize(
    ("vocab", "width"), [(VOCAB, WIDTH), (VOCAB - 1, WIDTH), (VOCAB, WIDTH - 1)]
)
def test_rows_and_gradient(config, vocab, width):
    """Also where neither 23 rows nor 15 columns can be split."""
    arrays = make_arrays(vocab, width)
    d_table, rows = gradient_function(config, arrays[0], jnp.float32)(*arrays)
    d_expected, expected = expected_of(*arrays)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(d_table, d_expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [None, *MESHES], ids=str)
def test_bfloat16_gradients_add_up_in_float32(config):
    """160 of them at one place: in bfloat16 each sum would lose a part of what is added."""
    table, tokens, weights = make_arrays(VOCAB, WIDTH)
    weights = np.asarray(jnp.asarray(np.abs(weights), jnp.bfloat16), np.float32)
    d_table, rows = gradient_function(config, table, jnp.bfloat16)(table, tokens, weights)
    d_expected, expected = expected_of(table, tokens, weights)
    assert rows.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows, jnp.asarray(expected, jnp.bfloat16))
    np.testing.assert_allclose(d_table, d_expected, rtol=1e-5, atol=1e-5)


def test_the_table_crosses_the_mesh_once():
    arrays = make_arrays(VOCAB, WIDTH)
    lowered = gradient_function(MeshConfig(2, 4, 1), arrays[0], jnp.bfloat16).lower(*arrays)
    text = lowered.compile().as_text()
    found = re.findall(r"= (\S+) (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", text)
    shapes = {kind: re.match(r"\w+\[[\d,]*\]", shape)[0] for shape, kind in found}
    assert len(found) == 3
    # CPUs send bfloat16 as float32.
    assert shapes["all-gather"] == "f32[24,16]"
    assert shapes["reduce-scatter"] == "f32[1,24,4]" and shapes["all-reduce"] == "f32[24,4]"
