"""The token embedding: rows of a table, whose gradient adds up in float32.

On a mesh every device looks up its own rows of the batch in its own part of the vocabulary: the
table is gathered over fsdp once, in the activations' dtype, and its gradient is reduced once.

Letters: B rows, N length, D model, V vocab.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dslt.core import sharding


@jax.named_scope("embedding")
def look_up(table: jax.Array, tokens: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """[B, N, D] in `dtype`: the rows of `table` [V, D] float32 at `tokens` [B, N] int32.

    On a mesh B is a multiple of `sharding.row_multiple`.
    """
    return _look_up(table, tokens, dtype, jax.sharding.get_abstract_mesh())


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _look_up(table, tokens, dtype, mesh):
    if mesh.empty:
        return jnp.take(table, tokens, axis=0).astype(dtype)
    where, (vocab_axis, width_axis) = _split(mesh, table)

    def on_device(table, tokens):
        table = table.astype(dtype)
        if width_axis:
            table = jax.lax.all_gather(table, width_axis, axis=1, tiled=True)
        if not vocab_axis:
            return jnp.take(table, tokens, axis=0)
        places = _places(tokens, vocab_axis, len(table))
        return jax.lax.psum(jnp.take(table, places, axis=0, fill_value=0), vocab_axis)

    rows = sharding.batch_spec()
    split = _on_devices(on_device, mesh=mesh, in_specs=(where, rows), out_specs=rows)
    return split(table, tokens)


def _forward(table, tokens, dtype, mesh):
    return _look_up(table, tokens, dtype, mesh), (table, tokens)


@jax.named_scope("embedding")
def _backward(dtype, mesh, saved, d_embedded):
    table, tokens = saved
    if mesh.empty:
        return _add_up(d_embedded, tokens, len(table)), None
    where, (vocab_axis, width_axis) = _split(mesh, table)
    others = tuple(axis for axis in sharding.row_axes(mesh) if axis != width_axis)
    size = len(table) // (mesh.shape[vocab_axis] if vocab_axis else 1)

    def on_device(d_embedded, tokens):
        places = _places(tokens, vocab_axis, size) if vocab_axis else tokens
        d_table = _add_up(d_embedded, places, size)
        if width_axis:
            d_table = _scatter_columns(d_table, width_axis)
        return jax.lax.psum(d_table, others)

    rows = sharding.batch_spec()
    split = _on_devices(on_device, mesh=mesh, in_specs=(rows, rows), out_specs=where)
    return split(d_embedded, tokens), None


_look_up.defvjp(_forward, _backward)

_on_devices = functools.partial(jax.shard_map, check_vma=False)


def _split(mesh, table) -> tuple[PartitionSpec, tuple[str | None, str | None]]:
    """Where the table lies, and the axes of several devices among those."""
    where = sharding.partition_spec(mesh, "token_embedding", shape=table.shape)
    return where, sharding.larger_axes(mesh, where)


def _places(tokens, vocab_axis: str, size: int):
    """The tokens' rows in this device's part of the table; `size`, past its end, where in none."""
    places = tokens - jax.lax.axis_index(vocab_axis) * size
    return jnp.where((places >= 0) & (places < size), places, size)


def _add_up(d_embedded, places, size: int):
    """[size, D] float32: the gradients' sum at each place; what is past the end is left out."""
    zeros = jnp.zeros((size, d_embedded.shape[-1]), jnp.float32)
    return zeros.at[places].add(d_embedded.astype(jnp.float32), mode="drop")


def _scatter_columns(matrix, axis: str):
    """[V, D] summed over a mesh axis, of which each device keeps its share of the columns.

    TPU compilers form a reduce-scatter along the first dimension alone.
    """
    parts = matrix.reshape(len(matrix), jax.lax.axis_size(axis), -1).swapaxes(0, 1)
    return jax.lax.psum_scatter(parts, axis)
