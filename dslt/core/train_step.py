"""One train step: both losses in one forward over one batch of packed rows.

Pure: a state and a batch in, a state and sums out. `train` jits it with shardings and donation.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dslt.core import losses, sharding
from dslt.core.batch import Batch
from dslt.core.consistency import consistency_loss
from dslt.core.cross_entropy import linear_cross_entropy
from dslt.core.keys import seeded_key
from dslt.errors import InputError

ON_NONFINITE = ("stop", "skip")


class TrainState(NamedTuple):
    """What a checkpoint holds. `step` counts the finished steps: a scalar int32.

    A negative step -n is a state that was halted: step n was not finite, and parameters and
    optimizer state are still those before it (see `resumable`).
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState


class StepMetrics(NamedTuple):
    """Of one step over the global batch; scalars unless said otherwise.

    Attributes:
      loss: the objective, nats per token.
      sums: RoleSums, [2] each.
      grad_norm: of the objective's gradient before clipping.
      is_finite: whether loss and gradient are, bool; else the step changed no parameter.
      consistency: of `consistency_loss`, nats an example; 0 where it has no weight.
    """

    loss: jax.Array
    sums: losses.RoleSums
    grad_norm: jax.Array
    is_finite: jax.Array
    consistency: jax.Array


@dataclasses.dataclass(frozen=True)
class GradientSettings:
    """What a gradient depends on besides parameters, batch and step.

    Attributes:
      rationale_weight: λ.
      seed: dropout keys are folded from it and the step.
      accumulation_steps: microbatches that the rows are dealt to, one after the other in memory.
      consistency_weight: of `consistency_loss` in the objective; 0 leaves it out of the program.
      consistency_temperature: its τ.
    """

    rationale_weight: float = 1.0
    seed: int = 0
    accumulation_steps: int = 1
    consistency_weight: float = 0.0
    consistency_temperature: float = 0.1


def init_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0 with fresh optimizer state."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def resumable(state: TrainState) -> TrainState:
    """The state itself; of a halted one, that before the step which was not finite."""
    return state._replace(step=jnp.where(state.step < 0, -state.step - 1, state.step))


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformationExtraArgs,
    settings: GradientSettings,
    clip_norm: float,
    on_nonfinite: str = "skip",
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[TrainState, StepMetrics]:
    """Takes one update.

    A loss or gradient that is not finite never reaches the parameters. That is decided on the
    device, so the host need not look at every step.

    Args:
      state: before the step.
      batch: the global batch; its rows must be a multiple of `settings.accumulation_steps`.
      graphdef: of the T5 that `state.params` belong to.
      optimizer: of `make_optimizer`.
      clip_norm: of the global gradient; 0 turns clipping off.
      on_nonfinite: `skip` leaves parameters and moments as they were and goes on; `stop` halts the
        state: no later step changes it.
      mesh: what the state and the batch are placed on; None on one device.

    Returns:
      The state after the step (`step` one higher) and what to log.

    Raises:
      InputError: the rows cannot be dealt out evenly, or the consistency term would not see all.
    """
    (loss, (sums, consistency)), grads = gradient_of(
        state.params, batch, state.step, graphdef=graphdef, settings=settings, mesh=mesh
    )
    with jax.named_scope("optimizer"):
        grad_norm = optax.tree.norm(grads)
        if clip_norm:
            scale = jnp.minimum(1.0, clip_norm / (grad_norm + 1e-12))
            grads = jax.tree.map(lambda g: g * scale, grads)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        is_taken = is_finite & (state.step >= 0) if on_nonfinite == "stop" else is_finite
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, is_taken=is_taken
        )
        params = optax.apply_updates(state.params, updates)
        params = jax.tree.map(partial(jnp.where, is_taken), params, state.params)
        new_state = TrainState(state.step + 1, params, opt_state)
        if on_nonfinite == "stop":
            new_state = _halt(state, new_state, is_taken)
    return new_state, StepMetrics(loss, sums, grad_norm, is_finite, consistency)


def gradient_of(
    params: dict,
    batch: Batch,
    step: jax.Array,
    *,
    graphdef: nnx.GraphDef,
    settings: GradientSettings,
    mesh: jax.sharding.Mesh | None,
) -> tuple[tuple[jax.Array, tuple[losses.RoleSums, jax.Array]], dict]:
    """((objective, (RoleSums, consistency loss)), the objective's gradient) of a batch.

    Arguments and errors are those of `train_step`.

    `step` is that before the update, from 0: dropout depends on it.
    """
    _check_microbatches(batch, settings)
    tokens = losses.role_weights(batch).sum((1, 2))  # of the whole global batch, before the split
    step_key = jax.random.fold_in(seeded_key(settings.seed), step)

    def microbatch_loss(params, microbatch, key):
        with sharding.inside(mesh):
            model = nnx.merge(graphdef, params)
            hidden = model.hidden(microbatch, key)
            loss, nll, is_correct = linear_cross_entropy(
                hidden,
                model.output_weight(),
                microbatch.decoder_target_tokens,
                losses.objective_weights(microbatch, tokens, settings.rationale_weight),
            )
            consistency = jnp.zeros(())
            if settings.consistency_weight:
                # A target has two tokens at least: no more examples than that find room.
                max_examples = microbatch.decoder_target_tokens.size // 2
                consistency = consistency_loss(
                    hidden, microbatch, max_examples, settings.consistency_temperature
                )
                loss += settings.consistency_weight * consistency
        return loss, (losses.sum_by_role(nll, is_correct, microbatch), consistency)

    gradient = jax.value_and_grad(microbatch_loss, has_aux=True)
    if settings.accumulation_steps == 1:
        return gradient(params, batch, step_key)
    return _accumulate(gradient, params, batch, step_key, settings.accumulation_steps)


def _check_microbatches(batch: Batch, settings: GradientSettings) -> None:
    rows, num = batch.decoder_target_tokens.shape[0], settings.accumulation_steps
    if rows % num:
        raise InputError(
            f"{rows} rows cannot be dealt to {num} microbatches; pad the batch with `pad_rows` to "
            "a multiple"
        )
    if settings.consistency_weight and num > 1:
        raise InputError(
            f"consistency_weight is {settings.consistency_weight} with {num} microbatches; "
            "expected 1: an example's label and rationale may lie in two of them"
        )


def _halt(state: TrainState, new: TrainState, is_taken: jax.Array) -> TrainState:
    """`new`, but halted where the step is not taken: at this step, or where `state` was already.

    A step that is not taken changed no real number; here its counters go back to those of `state`.
    """

    def settle(old, new):
        return new if jnp.issubdtype(new, jnp.floating) else jnp.where(is_taken, new, old)

    halted_step = jnp.where(state.step < 0, state.step, -new.step)
    return new._replace(
        step=jnp.where(is_taken, new.step, halted_step),
        opt_state=jax.tree.map(settle, state.opt_state, new.opt_state),
    )


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
