"""A digest is the same on the host, on any mesh, and is another after any change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dslt.checkpoint.digests import array_digest, tree_digests


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int32, np.uint8])
@pytest.mark.parametrize("shape", [(), (7,), (4, 6, 8), (3, 0), (2, 700, 401)])
def test_the_devices_agree_with_the_host(shape, dtype):
    array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    assert tree_digests({"a": jnp.asarray(array)}) == {"a": array_digest(array)}
    assert tree_digests({"a": array}) == {"a": array_digest(array)}


def test_no_mesh_changes_it():
    array = np.random.default_rng(0).normal(size=(8, 4, 6)).astype(np.float32)
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    for spec in (PartitionSpec(), PartitionSpec("a", "b"), PartitionSpec("b", None, None)):
        placed = jax.device_put(array, NamedSharding(mesh, spec))
        assert tree_digests({"x": {"y": placed}}) == {"x/y": array_digest(array)}


def test_any_bit_and_any_order_shows():
    array = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    digests = {array_digest(array), array_digest(array[::-1].copy())}
    bits = array.view(np.uint32)
    for element in np.ndindex(array.shape):
        for bit in range(32):
            bits[element] ^= np.uint32(1 << bit)
            digests.add(array_digest(array))
            bits[element] ^= np.uint32(1 << bit)
    assert len(digests) == 2 + array.size * 32
