"""Optimizers and learning-rate schedules, all from optax."""

import dataclasses

import optax

OPTIMIZERS = ("adamw", "adafactor")
SCHEDULES = ("constant", "linear", "cosine", "rsqrt")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The defaults are the paper's: AdamW, 5e-5, linear decay, no warm-up, clipping at norm 1.

    Attributes:
      schedule: after the warm-up: `constant`, `linear` or `cosine` to zero at the run's last step,
        or `rsqrt`, which falls with 1/√step from `warmup_steps` on (T5's pre-training).
      warmup_steps: linear from zero to `learning_rate`.
      weight_decay: decoupled, on every matrix (norm scales are exempt).
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
                raise ValueError(
                    f"OptimizerConfig.{field} is {getattr(self, field)!r}; expected one of "
                    f"{', '.join(allowed)}"
                )
        if self.learning_rate <= 0:
            raise ValueError(f"OptimizerConfig.learning_rate is {self.learning_rate}; expected > 0")


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
        return optax.adafactor(
            schedule,
            weight_decay_rate=config.weight_decay or None,
            multiply_by_parameter_scale=True,
        )
    return optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=_is_matrix if config.weight_decay else None,
    )


def _rsqrt_schedule(peak: float, start: int) -> optax.Schedule:
    return lambda step: peak * (start / (step + start)) ** 0.5


def _is_matrix(params):
    """Stacked norm scales are [L, D] and end in `scale`; everything else is decayed."""
    return {
        name: _is_matrix(value) if isinstance(value, dict) else name != "scale"
        for name, value in params.items()
    }
