"""Dropout whose bits are a hash of an entry's index, so that any program can draw the same ones."""

import functools

import jax
import jax.numpy as jnp


def dropout(x, rate: float, key):
    """Zeroes a share `rate` of the entries and scales the rest up; x itself where key is None.

    Every token draws its own mask. The original T5 shares one along the length, which in a packed
    row would tie different examples together.
    """
    if key is None or rate == 0.0:
        return x
    return _dropped(x, rate, jax.random.key_data(key))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _dropped(x, rate: float, words):
    """Drawn again on the way back: nothing of x's shape is kept for it."""
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        position = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        index = index * jnp.uint32(size) + position
    return jnp.where(is_kept(index, rate, *words), x / (1.0 - rate), 0.0).astype(x.dtype)


_dropped.defvjp(
    lambda x, rate, words: (_dropped(x, rate, words), words),
    lambda rate, words, d_out: (_dropped(d_out, rate, words), None),
)


def is_kept(index, rate: float, first, second):
    """Bool of the shape of `index` [...] uint32 (row-major, modulo 2**32), true at a share 1-rate.

    `jax.random.bits` spends a threefry block on each entry, which on a CPU is most of a train step;
    a mask needs less. As there, the bits depend on key and position alone, not on the sharding.
    Products carry bits upwards and shifts bring them down; what is compared are the upper ones.

    Args:
      first, second: the key's two words, uint32.

    Source: the multipliers are those of xxHash32 (Collet, BSD licence).
    """
    bits = (index ^ first) * jnp.uint32(0x9E3779B1)
    bits = ((bits ^ (bits >> 15)) + second) * jnp.uint32(0x85EBCA77)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE3D)
    return bits >= jnp.uint32(round(rate * 2**32))
