"""Model FLOPs of a train step, by formula, and the peaks of known accelerators.

    forward = 2 · Σ over matrices (its parameters × the real tokens that pass through it)
    step    = 3 · forward

The encoder's matrices and the decoder's cross-attention keys and values see the source tokens; the
rest of the decoder and the output projection see the target tokens. Embedding look-ups are free,
attention scores are left out (they depend on the packing, and are under a tenth at T5 v1.1 base
with examples of 100 tokens), and padding and rematerialisation do not count: MFU is then a lower
bound.

`traced_flops` counts the other way: every product of matrices that a traced program has, so with
padding, attention scores and rematerialisation: what the hardware has to do.
"""

import math

import jax

from dslt.core.t5 import T5Config

# Dense bfloat16 FLOP/s a chip. Source: the vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
}


def train_step_flops(config: T5Config, source_tokens: float, target_tokens: float) -> float:
    """Model FLOPs of one update over this many real tokens; the formula is the module's."""
    heads = config.num_heads * config.d_kv * config.d_model
    matrices = 3 if config.feed_forward_proj == "gated-gelu" else 2
    feed_forward = matrices * config.d_model * config.d_ff
    through_source = (
        config.num_layers * (4 * heads + feed_forward) + config.num_decoder_layers * 2 * heads
    )
    through_target = (
        config.num_decoder_layers * (6 * heads + feed_forward) + config.d_model * config.vocab_size
    )
    return 6.0 * (source_tokens * through_source + target_tokens * through_target)


def peak_flops(device: jax.Device) -> float | None:
    """Of one chip, or None where the kind is not in the table."""
    kind = device.device_kind
    matches = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def decode_flops(config: T5Config, source_tokens: float, target_tokens: float) -> float:
    """Model FLOPs of decoding: a forward over the source, and over each decoded token."""
    return train_step_flops(config, source_tokens, target_tokens) / 3


def traced_flops(jaxpr: jax.extend.core.Jaxpr) -> float:
    """FLOPs of all matrix products in a traced program, over all devices.

    Loops count by their length (a `while_loop`, which has none, counts once), kernels by their
    grid, what is mapped over devices by their number, a condition as the dearest of its branches.
    XLA's own `cost_analysis` counts the body of a loop once.

    Args:
      jaxpr: `jitted.trace(...).jaxpr.jaxpr`.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            total += _product_flops(equation)
            continue
        times = 1
        if equation.primitive.name == "scan":
            times = equation.params["length"]
        elif equation.primitive.name == "pallas_call":
            times = math.prod(equation.params["grid_mapping"].grid)
        elif equation.primitive.name == "shard_map":  # written for one device
            times = equation.params["mesh"].size
        combine = max if equation.primitive.name == "cond" else sum
        total += times * combine(traced_flops(inner) for inner in _inner_jaxprs(equation))
    return total


def _product_flops(equation) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    summed = math.prod(left[axis] for axis in contracted)
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * summed


def _inner_jaxprs(equation):
    """The jaxprs among an equation's parameters: bodies, branches, called functions."""
    for value in jax.tree.leaves(equation.params, is_leaf=lambda value: hasattr(value, "eqns")):
        inner = getattr(value, "jaxpr", value)  # a ClosedJaxpr holds a Jaxpr
        if hasattr(inner, "eqns"):
            yield inner
