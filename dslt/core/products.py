"""Products of matrices that add up in float32, forward and backward, whatever their operands are.

On a CPU, XLA multiplies bfloat16 arrays by its matrix units only where the result is asked for in
float32, and converts both to float32 otherwise: 1,200 against 180 Gflop/s on two cores with AMX. A
gradient by autodiff is never asked for so: it mixes the types. Here it is written out.
"""

import jax
import jax.numpy as jnp


def einsum(spec: str, a: jax.Array, b: jax.Array, dtype=jnp.float32) -> jax.Array:
    """`jnp.einsum` of two arrays of one dtype, to `dtype`.

    On a CPU a contraction over an array's rows alone, "md,mf->df", is one of converted operands
    too; over rows and something before them, "bmd,bmf->df", it is not.
    """

    def rounded_after(a, b):
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32).astype(dtype)

    def at_once(a, b):  # what devices then add to it crosses the mesh in `dtype`
        return jnp.einsum(spec, a, b, preferred_element_type=dtype)

    if dtype == jnp.float32:
        return at_once(a, b)
    return jax.lax.platform_dependent(a, b, cpu=rounded_after, default=at_once)


def project(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """[B, N, D] by [D, F] to [B, N, F], all of one dtype."""
    if x.dtype == jnp.float32:
        # One product of matrices: the gradient of a three-dimensional one copies its operand.
        return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:2], -1)
    return _project_narrow(x, matrix)


@jax.custom_vjp
def _project_narrow(x, matrix):
    return einsum("bnd,df->bnf", x, matrix, x.dtype)


def _project_forward(x, matrix):
    return _project_narrow(x, matrix), (x, matrix)


def _project_backward(saved, d_out):
    x, matrix = saved
    d_x = einsum("bnf,df->bnd", d_out, matrix, x.dtype)
    return d_x, einsum("bnd,bnf->df", x, d_out, x.dtype)


_project_narrow.defvjp(_project_forward, _project_backward)


def swap_heads(x: jax.Array) -> jax.Array:
    """[B, N, H, K] to [B, H, N, K], or back; on a CPU an array of its own.

    XLA would else merge the transposition into the products.
    """

    def as_array(x):
        return jax.lax.optimization_barrier(x.swapaxes(1, 2))

    return jax.lax.platform_dependent(x, cpu=as_array, default=lambda x: x.swapaxes(1, 2))
