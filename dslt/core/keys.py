"""Random keys that are the same wherever a run goes on."""

import jax


def seeded_key(seed: int) -> jax.Array:
    """A threefry key, whatever JAX_DEFAULT_PRNG_IMPL says: of its two words dropout's masks are
    made, and the bits of other kinds differ between accelerators.
    """
    return jax.random.key(seed, impl="threefry2x32")
