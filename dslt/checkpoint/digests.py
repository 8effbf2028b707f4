"""Digests of arrays: whether what is read from a checkpoint is what was saved, bit for bit.

Orbax does not say: a bit that flips in a zarr chunk comes back as another number. A digest is taken
on the devices that hold the array, and is the same on any mesh and on the host.

    saved = tree_digests(state.params)          # {"encoder/final_norm/scale": "8f1c02aa", …}
    is_whole = array_digest(read) == saved["encoder/final_norm/scale"]
"""

import jax
import jax.numpy as jnp
import numpy as np

CHUNK_ELEMENTS = 1 << 18  # hashed on the host at a time: what its caches hold


def tree_digests(tree) -> dict[str, str]:
    """The digest of each array of a tree, by its path. All processes that hold a part call it."""
    named = dict(named_leaves(tree))
    on_devices = {name: leaf for name, leaf in named.items() if isinstance(leaf, jax.Array)}
    sums = jax.device_get(_device_sums(on_devices))
    return {
        name: f"{int(sums[name]):08x}" if name in sums else array_digest(leaf)
        for name, leaf in named.items()
    }


def array_digest(array: np.ndarray) -> str:
    """The digest of an array on the host, 8 hex digits.

    It is Σ mix(bits[i] ^ mix(i)) mod 2^32 over the elements i in C order. `mix` is a bijection, so
    that one changed element always shows, and several all but one time in 2^32; a sum, so that the
    devices may add their parts in any order.
    """
    bits = np.atleast_1d(array).reshape(-1).view(f"uint{8 * array.dtype.itemsize}")
    total = 0
    for start in range(0, len(bits), CHUNK_ELEMENTS):
        chunk = bits[start : start + CHUNK_ELEMENTS].astype(np.uint32)
        index = np.arange(start, start + len(chunk)).astype(np.uint32)
        total += int(_mix(chunk ^ _mix(index)).sum(dtype=np.uint32))
    return f"{total % 2**32:08x}"


@jax.jit
def _device_sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _device_sum(array) for name, array in arrays.items()}


def _device_sum(array: jax.Array) -> jax.Array:
    """`array_digest` as a uint32. Each dimension adds to the index: a reshape would gather."""
    bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")
    index, stride = jnp.uint32(0), 1
    for axis in reversed(range(array.ndim)):
        position = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        index += position * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    return jnp.sum(_mix(bits.astype(jnp.uint32) ^ _mix(index)), dtype=jnp.uint32)


def _mix(x):
    """Source: the finalizer of MurmurHash3 (Austin Appleby, public domain), fmix32."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def named_leaves(tree) -> list[tuple[str, jax.Array]]:
    """(path, leaf) of a tree, such as ("encoder/final_norm/scale", …)."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
