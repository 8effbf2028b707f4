"""Products of narrow operands: their numbers, their gradients, the programs they become."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dslt.core import products, t5, train_step
from dslt.core.batch import pad_rows
from tests.core.test_train_step import LABEL_0, LABEL_1, RATIONALE_0, RATIONALE_1, TINY

ROUNDED = 2e-2  # of the largest: operands and results have 8 bits


def make_arrays(dtype, rows=3, length=5, width=7, out=6):
    rng = np.random.default_rng(0)
    shapes = (rows, length, width), (width, out), (rows, length, out)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def value_and_gradients(x, matrix, d_out):
    out, pull_back = jax.vjp(products.project, x, matrix)
    return out, *pull_back(d_out)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_projection_and_its_gradients_are_those_of_einsum(dtype):
    x, matrix, d_out = make_arrays(dtype)
    found = jax.jit(value_and_gradients)(x, matrix, d_out)
    wide = [np.asarray(array, np.float64) for array in (x, matrix, d_out)]
    expected = (
        np.einsum("bnd,df->bnf", wide[0], wide[1]),
        np.einsum("bnf,df->bnd", wide[2], wide[1]),
        np.einsum("bnd,bnf->df", wide[0], wide[2]),
    )
    tolerance = ROUNDED if dtype == jnp.bfloat16 else 1e-6
    for array, known in zip(found, expected, strict=True):
        assert array.dtype == dtype
        scale = np.abs(known).max()
        np.testing.assert_allclose(
            np.asarray(array, np.float64) / scale, known / scale, atol=tolerance
        )


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 8, 4, 4), (5, 1, 3, 2), (2, 33, 17, 1)])
def test_shapes_of_every_kind_run(shape):
    """XLA chooses a product's implementation by its shape; on a CPU some have failed when run."""
    arrays = make_arrays(jnp.bfloat16, *shape)
    for array in jax.jit(value_and_gradients)(*arrays):
        assert np.isfinite(np.asarray(array, np.float32)).all()


def test_a_bfloat16_step_multiplies_no_converted_matrices(build_batch):
    """On CPUs with matrix units: forward and backward, in layers and in the output layer."""
    product = jax.jit(value_and_gradients).lower(*make_arrays(jnp.bfloat16, 4, 32, 64, 64))
    if "bf16" not in "".join(find_products(product.compile().as_text())):
        pytest.skip("this processor multiplies bfloat16 as float32")
    config = t5.T5Config(**TINY | dict(dropout_rate=0.1, dtype="bfloat16", scan_unroll=2))
    graphdef, params = t5.init_params(config, seed=0)
    rows = [[LABEL_0, RATIONALE_0], [LABEL_1, RATIONALE_1]]
    batch = pad_rows(build_batch(rows, 14, 12), 1)

    def gradient(params):
        return train_step.gradient_of(
            params,
            batch,
            jnp.int32(0),
            graphdef=graphdef,
            settings=train_step.GradientSettings(),
            mesh=None,
        )[1]

    found = find_products(jax.jit(gradient).lower(params).compile().as_text())
    # The exact float32 ones: biases by distance and their sums, counts by role.
    wide = [line for line in found if "f32" in line.split("=")[1].split("(")[1]]
    narrow = [line for line in found if line not in wide]
    assert len(narrow) > 60, found
    assert not [line for line in wide if "attention/nc" not in line and "highest" not in line], wide


def find_products(program: str) -> list[str]:
    """Each dot of a compiled program with the types of its operands in place of their names."""
    types = dict(re.findall(r"%?([\w.-]+) = (\w+\[[\d,]*\])", program))
    types |= dict(re.findall(r"([\w.-]+): (\w+\[[\d,]*\])", program))
    dots = re.findall(r"= (\S+) dot\(%([\w.-]+), %([\w.-]+)\)(.*)", program)
    return [f"{out} = dot({types[a]}, {types[b]}){rest}" for out, a, b, rest in dots]
