"""One train step: both losses in one forward over one batch of packed rows.

Pure: a state and a batch in, a state and sums out. `train` jits it with shardings and donation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dslt.core import losses, sharding
from dslt.core.batch import Batch
from dslt.core.cross_entropy import linear_cross_entropy
from dslt.errors import InputError


class TrainState(NamedTuple):
    """What a checkpoint holds. `step` counts the finished updates: a scalar int32."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState


class StepMetrics(NamedTuple):
    """Of one step over the global batch; scalars unless said otherwise.

    Attributes:
      loss: the objective, nats per token.
      sums: RoleSums, [2] each.
      grad_norm: of the objective's gradient before clipping.
    """

    loss: jax.Array
    sums: losses.RoleSums
    grad_norm: jax.Array


def init_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0 with fresh optimizer state."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    rationale_weight: float,
    clip_norm: float,
    seed: int,
    accumulation_steps: int = 1,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[TrainState, StepMetrics]:
    """Takes one update.

    Args:
      state: before the step.
      batch: the global batch; its rows must be a multiple of `accumulation_steps`.
      graphdef: of the T5 that `state.params` belong to.
      rationale_weight: λ.
      clip_norm: of the global gradient; 0 turns clipping off.
      seed: dropout keys are folded from it and the step.
      accumulation_steps: microbatches that the rows are dealt to, one after the other in memory.
      mesh: what the state and the batch are placed on; None on one device.

    Returns:
      The state after the step (`step` one higher) and what to log.

    Raises:
      InputError: the rows cannot be dealt out evenly.
    """
    rows = batch.decoder_target_tokens.shape[0]
    if rows % accumulation_steps:
        raise InputError(
            f"{rows} rows cannot be dealt to {accumulation_steps} microbatches; pad the batch with "
            "`pad_rows` to a multiple"
        )
    tokens = losses.role_weights(batch).sum((1, 2))  # of the whole global batch, before the split
    step_key = jax.random.fold_in(jax.random.key(seed), state.step)

    def microbatch_loss(params, microbatch, key):
        with sharding.inside(mesh):
            model = nnx.merge(graphdef, params)
            loss, nll, is_correct = linear_cross_entropy(
                model.hidden(microbatch, key),
                model.output_weight(),
                microbatch.decoder_target_tokens,
                losses.objective_weights(microbatch, tokens, rationale_weight),
            )
        return loss, losses.sum_by_role(nll, is_correct, microbatch)

    gradient = jax.value_and_grad(microbatch_loss, has_aux=True)
    if accumulation_steps == 1:
        (loss, sums), grads = gradient(state.params, batch, step_key)
    else:
        (loss, sums), grads = _accumulate(
            gradient, state.params, batch, step_key, accumulation_steps
        )
    with jax.named_scope("optimizer"):
        grad_norm = optax.tree.norm(grads)
        if clip_norm:
            scale = jnp.minimum(1.0, clip_norm / (grad_norm + 1e-12))
            grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), StepMetrics(loss, sums, grad_norm)


def _accumulate(gradient, params, batch: Batch, step_key, num: int):
    """Sums `gradient` over `num` microbatches; row i goes to microbatch i mod num.

    Dealing rows out in turn keeps each device's rows on it: with the batch sharded over rows, a
    contiguous split would move them.
    """
    microbatches = jax.tree.map(
        lambda x: x.reshape(x.shape[0] // num, num, *x.shape[1:]).swapaxes(0, 1), batch
    )
    keys = jax.random.split(step_key, num)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], microbatches), keys[0]),
    )

    def add_one(total, inputs):
        microbatch, key = inputs
        return jax.tree.map(jnp.add, total, gradient(params, microbatch, key)), None

    return jax.lax.scan(add_one, zeros, (microbatches, keys))[0]
