"""Optimizers and learning-rate schedules, all from optax."""

import dataclasses

import jax
import optax

from dslt.errors import InputError

OPTIMIZERS = ("adamw", "adafactor")
SCHEDULES = ("constant", "linear", "cosine", "rsqrt")


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


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """The update rule, without clipping: the train step clips, because it logs the norm."""
    schedule = make_schedule(config, num_steps)
    if config.name == "adafactor":
        rule = _adafactor(schedule)
        if not config.weight_decay:
            return rule
        # Not adafactor's own `weight_decay_rate`: that one leaves the learning rate out.
        decay = optax.add_decayed_weights(
            lambda step: -config.weight_decay * schedule(step), mask=_is_matrix
        )
        return optax.chain(rule, decay)
    return optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=_is_matrix if config.weight_decay else None,
    )


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
