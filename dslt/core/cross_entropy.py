"""Cross-entropy of a linear output layer, without the logits of all tokens at once.

T5's output layer is wide: the float32 logits of 4,096 tokens over 32,128 pieces are half a
gigabyte, and autodiff keeps them for the backward pass. Here the tokens go through the layer in
chunks, and each chunk's gradients are taken while its logits are there: three products of matrices,
as with all logits at once, and nothing larger than [chunk_tokens, V].

On a mesh every device works on its own rows and its own part of the vocabulary: the weight is
gathered once over fsdp, its gradient is reduced once, and what crosses the tensor axis is a few
numbers a token and the [tokens, D] gradient.

Letters: B rows, T target, D model, V vocab, C tokens of a chunk.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dslt.core import sharding
from dslt.core.products import einsum

CHUNK_TOKENS = 1024  # on each device; 132 MB of float32 logits over 32,128 pieces


@partial(jax.custom_vjp, nondiff_argnums=(4,))
@jax.named_scope("output_layer")
def linear_cross_entropy(
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    token_weights: jax.Array,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The weighted sum of `-log softmax(hidden · weight)[target]` over the tokens.

    Args:
      hidden: [B, T, D], float32 or bfloat16; products of matrices run in its dtype and add up in
        float32, as does everything else.
      weight: [D, V] float32.
      targets: [B, T] int32.
      token_weights: [B, T] float32.
      chunk_tokens: tokens a device looks at at once.

    Returns:
      The loss, a scalar, and of each token [B, T] its negative log-likelihood in nats, float32, and
      whether its most likely piece is the target, bool. Only the loss has a gradient.
    """
    return _on_mesh(hidden, weight, targets, token_weights, chunk_tokens, with_gradients=False)[:3]


@jax.named_scope("output_layer")
def _forward(hidden, weight, targets, token_weights, chunk_tokens):
    *values, d_hidden, d_weight = _on_mesh(
        hidden, weight, targets, token_weights, chunk_tokens, with_gradients=True
    )
    return tuple(values), (d_hidden, d_weight, values[1])


def _backward(chunk_tokens, gradients, cotangents):
    """Scales what the forward pass found by the loss's cotangent, which a train step has at 1."""
    d_loss, *_ = cotangents
    d_hidden, d_weight, nll = gradients
    return (d_loss * d_hidden).astype(d_hidden.dtype), d_loss * d_weight, None, d_loss * nll


linear_cross_entropy.defvjp(_forward, _backward)


def _on_mesh(hidden, weight, targets, token_weights, chunk_tokens, with_gradients: bool):
    """`_in_chunks` on each device's rows and part of the vocabulary, where there is a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        arrays = hidden, weight.astype(hidden.dtype), targets, token_weights
        return _in_chunks(*arrays, chunk_tokens, with_gradients)
    head = sharding.partition_spec(mesh, "lm_head", shape=weight.shape)
    width_axis, vocab_axis = sharding.larger_axes(mesh, head)
    rows, row_axes = sharding.batch_spec(), sharding.row_axes(mesh)

    def on_device(hidden, weight, targets, token_weights):
        weight = weight.astype(hidden.dtype)
        if width_axis:
            weight = jax.lax.all_gather(weight, width_axis, axis=0, tiled=True)
        loss, nll, is_correct, *gradients = _in_chunks(
            hidden, weight, targets, token_weights, chunk_tokens, with_gradients, vocab_axis
        )
        loss = jax.lax.psum(loss, row_axes)
        if not with_gradients:
            return loss, nll, is_correct
        d_hidden, d_weight = gradients
        if width_axis:
            d_weight = _scatter_rows(d_weight, width_axis)
        others = tuple(axis for axis in row_axes if axis != width_axis)
        return loss, nll, is_correct, d_hidden, jax.lax.psum(d_weight, others)

    values = PartitionSpec(), rows, rows
    return jax.shard_map(
        on_device,
        in_specs=(rows, head, rows, rows),
        out_specs=(*values, rows, head) if with_gradients else values,
        check_vma=False,
    )(hidden, weight, targets, token_weights)


def _scatter_rows(matrix, axis: str):
    """[D, V] summed over a mesh axis, of which each device keeps its share of the rows.

    TPU compilers sum it whole and slice unless its columns are a multiple of 256.
    """
    columns = matrix.shape[1]
    padded = jnp.pad(matrix, ((0, 0), (0, -columns % 256)))
    return jax.lax.psum_scatter(padded, axis, tiled=True)[:, :columns]


def _in_chunks(
    hidden, weight, targets, token_weights, chunk_tokens: int, with_gradients: bool, vocab_axis=None
):
    """Loss, nll, is_correct and, if asked for, the gradients by `hidden` and by `weight`.

    Args:
      weight: [D, V] in the dtype of `hidden`, or this device's columns of it.
      vocab_axis: the mesh axis that V is split over, if it is.
    """
    shape, width = targets.shape, hidden.shape[-1]
    tokens = math.prod(shape)
    chunks = max(1, -(-tokens // chunk_tokens))
    size = 2 * -(-tokens // (2 * chunks))

    def cut(x):
        x = x.reshape(tokens, *x.shape[2:])
        x = jnp.pad(x, ((0, chunks * size - tokens),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(chunks, size, *x.shape[1:])

    def one_chunk(d_weight, chunk):
        hidden, targets, token_weights = chunk  # [C, D], [C], [C]
        nll, is_correct, d_logits = _one_chunk(hidden, weight, targets, token_weights, vocab_axis)
        if not with_gradients:
            return d_weight, (nll, is_correct)
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = einsum("tv,dv->td", d_logits, weight)
        d_hidden = _over(jax.lax.psum, d_hidden, vocab_axis).astype(hidden.dtype)
        halves = (x.reshape(2, -1, x.shape[-1]) for x in (hidden, d_logits))  # see products.einsum
        d_weight += einsum("btd,btv->dv", *halves)
        return d_weight, (nll, is_correct, d_hidden)

    start = jnp.zeros(weight.shape, jnp.float32) if with_gradients else None
    d_weight, outputs = jax.lax.scan(
        one_chunk, start, (cut(hidden), cut(targets), cut(token_weights))
    )
    nll, is_correct, *d_hidden = (x.reshape(-1, *x.shape[2:])[:tokens] for x in outputs)
    nll, is_correct = nll.reshape(shape), is_correct.reshape(shape)
    loss = (nll * token_weights).sum()
    if not with_gradients:
        return loss, nll, is_correct
    return loss, nll, is_correct, d_hidden[0].reshape(*shape, width), d_weight


def _one_chunk(hidden, weight, targets, token_weights, vocab_axis):
    """nll [C], is_correct [C] and the gradient by the logits [C, V] of [C, D] and [D, V]."""
    logits = einsum("td,dv->tv", hidden, weight)
    places = targets  # of this device's columns
    if vocab_axis:
        places -= jax.lax.axis_index(vocab_axis) * logits.shape[1]
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == places[:, None]
    target_logits = _over(jax.lax.psum, _logits_at(logits, places), vocab_axis)
    highest = _over(jax.lax.pmax, logits.max(-1), vocab_axis)
    exponentials = jnp.exp(logits - highest[:, None])
    total = _over(jax.lax.psum, exponentials.sum(-1), vocab_axis)
    nll = jnp.log(total) + highest - target_logits
    probability_scale = (token_weights / total)[:, None]
    d_logits = exponentials * probability_scale - jnp.where(is_target, token_weights[:, None], 0.0)
    return nll, target_logits >= highest, d_logits


def _logits_at(logits, places):
    """[C, V] and [C] to [C]: each row's logit at its place, 0 where there is none such."""

    def gathered(logits, places):
        inside = jnp.clip(places, 0, logits.shape[1] - 1)
        found = jnp.take_along_axis(logits, inside[:, None], axis=1)[:, 0]
        return jnp.where(places == inside, found, 0.0)

    def summed(logits, places):
        pieces = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        return jnp.where(pieces == places[:, None], logits, 0.0).sum(-1)

    # On a CPU the sum is two more passes over the logits; elsewhere it goes with the maximum's.
    return jax.lax.platform_dependent(logits, places, cpu=gathered, default=summed)


def _over(reduce, x, axis):
    return reduce(x, axis) if axis else x
