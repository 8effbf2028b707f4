"""The FLOPs formula against a count by hand."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from dslt.core import products
from dslt.core.flops import decode_flops, peak_flops, traced_flops, train_step_flops
from dslt.core.sharding import MeshConfig, make_mesh
from dslt.core.t5 import T5Config, abstract_params, count_params

CONFIG = T5Config(
    vocab_size=11, d_model=4, d_kv=3, d_ff=5, num_heads=2, num_layers=1, num_decoder_layers=1
)


def test_each_matrix_counts_once_for_each_token_that_passes_it():
    attention, feed_forward = 4 * 4 * 6, 3 * 4 * 5  # query, key, value, out; wi_0, wi_1, wo
    assert train_step_flops(CONFIG, 1, 0) == 6 * (attention + feed_forward + 2 * 4 * 6)
    assert train_step_flops(CONFIG, 0, 1) == 6 * (attention + 2 * 4 * 6 + feed_forward + 4 * 11)


def test_all_parameters_but_the_embedding_norms_and_biases_are_matrices():
    params = abstract_params(CONFIG)[1]
    others = 11 * 4 + 2 * 32 * 2 + 7 * 4  # token embedding, two bias tables, seven norms
    assert train_step_flops(CONFIG, 1, 1) == 6 * (count_params(params) - others)


def test_relu_has_one_matrix_less():
    relu = dataclasses.replace(CONFIG, feed_forward_proj="relu")
    assert train_step_flops(CONFIG, 1, 0) - train_step_flops(relu, 1, 0) == 6 * 4 * 5


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("TPU v5 lite", 197),
        ("cpu", None),
    ],
)
def test_the_longest_name_says_the_peak(kind, teraflops):
    peak = peak_flops(types.SimpleNamespace(device_kind=kind))
    assert peak == (teraflops and teraflops * 1e12)


def traced(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return traced_flops(jax.jit(function).trace(*arguments).jaxpr.jaxpr)


def test_traced_products_count_in_loops_and_in_rematerialised_layers():
    def layer(x, w):
        return jnp.tanh(x @ w) @ w, None

    def loss(x, w, layer=layer):
        return jax.lax.scan(lambda x, _: layer(x, w), x, None, length=5)[0].sum()

    product = 2 * 8 * 16 * 16
    assert traced(loss, (8, 16), (16, 16)) == 5 * 2 * product
    assert traced(jax.grad(loss, argnums=1), (8, 16), (16, 16)) == 5 * 6 * product
    again = functools.partial(loss, layer=jax.checkpoint(layer))
    # The forward, in the backward the first product again, and twice as much for the gradients.
    assert traced(jax.grad(again, argnums=1), (8, 16), (16, 16)) == 5 * 7 * product


def test_traced_flops_are_xlas_own_where_nothing_loops():
    def function(a, b):
        return jnp.einsum("bqhk,bnhk->bhqn", a, b)

    shapes = (2, 8, 3, 4), (2, 16, 3, 4)
    compiled = jax.jit(function).lower(*(jnp.ones(shape) for shape in shapes)).compile()
    assert traced(function, *shapes) == compiled.cost_analysis()["flops"] == 2 * 2 * 3 * 8 * 16 * 4


def test_a_condition_counts_as_its_dearest_branch():
    """So does a product that is asked for otherwise on a CPU than elsewhere."""

    def function(a, b):
        return jax.lax.cond(a.sum() > 0, lambda: (a @ b) @ b, lambda: a @ b)

    product = 2 * 4 * 8 * 8
    assert traced(function, (4, 8), (8, 8)) == 2 * product

    def narrow(a, b):
        return products.einsum("td,dv->tv", a.astype("bfloat16"), b.astype("bfloat16"), "bfloat16")

    assert traced(narrow, (4, 8), (8, 8)) == product


def test_what_is_mapped_over_devices_counts_on_each():
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    rows, columns = PartitionSpec("data"), PartitionSpec(None, "tensor")

    def function(a, b):
        specs = dict(in_specs=(rows, columns), out_specs=PartitionSpec("data", "tensor"))
        return jax.shard_map(lambda a, b: a @ b, mesh=mesh, **specs)(a, b)

    assert traced(function, (4, 8), (8, 16)) == 2 * 4 * 8 * 16


def test_decoding_is_a_forward():
    assert decode_flops(CONFIG, 7, 3) == train_step_flops(CONFIG, 7, 3) / 3
