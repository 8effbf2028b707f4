"""Optimizers and learning-rate schedules, from optax."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from dslt.errors import InputError

OPTIMIZERS = ("adamw", "adafactor")
SCHEDULES = ("constant", "linear", "cosine", "rsqrt")
ADAM_EPSILON = 1e-8


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The defaults are the paper's: AdamW, 5e-5, linear decay, no warm-up, clipping at norm 1.

    Attributes:
      learning_rate: the peak. Adafactor's is relative: a step's RMS as a share of the matrix's own
        (T5 was fine-tuned with 1e-3).
      schedule: after the warm-up: `constant`, `linear` or `cosine` to zero at the run's last step,
        or `rsqrt`, which falls with 1/√step from `warmup_steps` on (T5's pre-training).
      warmup_steps: linear from zero to `learning_rate`.
      weight_decay: decoupled, times the learning rate, on every matrix (norm scales are exempt).
      clip_norm: of the global gradient; 0 turns clipping off.
      beta1, beta2: AdamW's.
    """

    name: str = "adamw"
    learning_rate: float = 5e-5
    schedule: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999

    def __post_init__(self):
        for field, allowed in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, field) not in allowed:
                raise InputError(
                    f"OptimizerConfig.{field} is {getattr(self, field)!r}; expected one of "
                    f"{', '.join(allowed)}"
                )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(
                    f"OptimizerConfig.{name} is {getattr(self, name)}; expected 0 <= {name} < 1"
                )
        if self.learning_rate <= 0:
            raise InputError(f"OptimizerConfig.learning_rate is {self.learning_rate}; expected > 0")
        for field in ("warmup_steps", "weight_decay", "clip_norm"):
            if getattr(self, field) < 0:
                raise InputError(
                    f"OptimizerConfig.{field} is {getattr(self, field)}; expected 0 or more"
                )


def is_decaying(config: OptimizerConfig) -> bool:
    """Whether the learning rate of a step depends on the number of steps in all."""
    return config.schedule in ("linear", "cosine")


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Step (0-based) to learning rate."""
    peak, warmup = config.learning_rate, config.warmup_steps
    decay_steps = max(num_steps - warmup, 1)
    if config.schedule == "rsqrt":
        after = _rsqrt_schedule(peak, max(warmup, 1))
    else:
        after = {
            "constant": optax.constant_schedule(peak),
            "linear": optax.linear_schedule(peak, 0.0, decay_steps),
            "cosine": optax.cosine_decay_schedule(peak, decay_steps),
        }[config.schedule]
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(
    config: OptimizerConfig, num_steps: int
) -> optax.GradientTransformationExtraArgs:
    """The update rule, without clipping: the train step clips, because it logs the norm.

    Its `update` takes `is_taken`, a scalar bool: where false, the update is not to be applied, and
    the moments stay as they are. Counters go on, so that the learning rate stays a function of the
    step.
    """
    schedule = make_schedule(config, num_steps)
    if config.name == "adafactor":
        rule = _adafactor(schedule)
        if config.weight_decay:
            # Not adafactor's own `weight_decay_rate`: that one leaves the learning rate out.
            decay = optax.add_decayed_weights(
                lambda step: -config.weight_decay * schedule(step), mask=_is_matrix
            )
            rule = optax.chain(rule, decay)
        return settled(rule)
    mask = _is_matrix if config.weight_decay else None
    return optax.chain(
        _scale_by_adam(config.beta1, config.beta2),
        optax.add_decayed_weights(config.weight_decay, mask),
        optax.scale_by_learning_rate(schedule),
    )


def settled(rule: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`rule` with the argument `is_taken` of `make_optimizer`."""

    def update(grads, state, params=None, *, is_taken=True):
        def settle(old, new):
            return jnp.where(is_taken, new, old) if jnp.issubdtype(new, jnp.floating) else new

        updates, new_state = rule.update(grads, state, params)
        return updates, jax.tree.map(settle, state, new_state)

    return optax.GradientTransformationExtraArgs(rule.init, update)


def _scale_by_adam(beta1: float, beta2: float) -> optax.GradientTransformationExtraArgs:
    """`settled(optax.scale_by_adam(…))`, whose update is made of the moments that are kept.

    Made of others, moments are computed twice, and on a CPU copied, since XLA writes them in place:
    twice the time of the whole update.

    Source: Kingma and Ba 2015 (arXiv 1412.6980), algorithm 1.
    """

    def update(grads, state, params=None, *, is_taken=True):
        def moment(decay, old, new):
            return jnp.where(is_taken, decay * old + (1 - decay) * new, old)

        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: moment(beta1, m, g), state.mu, grads)
        nu = jax.tree.map(lambda v, g: moment(beta2, v, g * g), state.nu, grads)
        mu_scale, nu_scale = (1 / (1 - beta**count) for beta in (beta1, beta2))
        updates = jax.tree.map(
            lambda m, v: mu_scale * m / (jnp.sqrt(nu_scale * v) + ADAM_EPSILON), mu, nu
        )
        return updates, optax.ScaleByAdamState(count, mu, nu)

    init = optax.scale_by_adam(beta1, beta2).init
    return optax.GradientTransformationExtraArgs(init, update)


def _rsqrt_schedule(peak: float, start: int) -> optax.Schedule:
    return lambda step: peak * (start / (step + start)) ** 0.5


def _adafactor(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Adafactor over the matrices that T5 has: one a layer, with the heads side by side.

    As stacked here, all layers would share the RMS that an update is clipped and scaled by; and
    optax factors dimensions of 128 and more, so [D, H, K] with K = 64 would be kept whole.

    Source: Shazeer and Stern 2018 (arXiv 1804.04235).
    """
    rule = optax.adafactor(schedule)

    def update(grads, state, params):
        updates, state = rule.update(_merge_heads(grads), state, _merge_heads(params))
        return jax.tree.map(lambda u, g: u.reshape(g.shape), updates, grads), state

    single = optax.GradientTransformation(lambda params: rule.init(_merge_heads(params)), update)
    stacked = optax.GradientTransformation(jax.vmap(single.init), jax.vmap(single.update))
    rules = {"single": single, "encoder": stacked, "decoder": stacked}
    return optax.partition(rules, _label_stacks)


def _merge_heads(tree):
    """Attention's [D, H, K] and [H, K, D] of one layer as [D, H*K] and [H*K, D]."""

    def merge(path, x):
        if path[-1].key in ("query", "key", "value"):
            return x.reshape(x.shape[0], -1)
        return x.reshape(-1, x.shape[-1]) if path[-1].key == "out" else x

    return jax.tree_util.tree_map_with_path(merge, tree)


def _label_stacks(params):
    """`encoder` or `decoder` where a parameter has that stack's layer axis, `single` elsewhere."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[0].key if path[1:] and path[1].key == "layers" else "single", params
    )


def _is_matrix(params):
    """Stacked norm scales are [L, D] and end in `scale`; everything else is decayed."""
    return {
        name: _is_matrix(value) if isinstance(value, dict) else name != "scale"
        for name, value in params.items()
    }
