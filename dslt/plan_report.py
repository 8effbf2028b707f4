"""What `dslt plan` prints. Imports plan, plan_search and core."""

from dslt.core import hlo
from dslt.core.topology import GIB
from dslt.plan import MARGIN, DecodePlan, Memory, TrainPlan
from dslt.plan_search import Trial


def report_training(plan: TrainPlan) -> list[str]:
    """Lines: does it fit, what it computes, what it sends, what bounds it."""
    shape, topology = plan.run.shape, plan.topology
    fill = " and ".join(f"{share:.2f}" for share in (shape.source_fill, shape.target_fill))
    mesh = " × ".join(f"{name} {size}" for name, size in plan.mesh_shape.items() if size > 1)
    lines = [
        f"topology    {topology}: {topology.num_chips} chips, mesh {mesh or 'of one device'}",
        f"batch       {shape.examples} examples in {plan.rows} rows of {shape.source_length} and "
        f"{shape.target_length} tokens, fill {fill} ({shape.origin})",
    ]
    if topology.is_estimate:
        lines.append(
            "ESTIMATE    compiled for the CPU: a GPU's compiler fuses and lays out otherwise; it "
            "comes with pip install '.[plan]' from a checkout"
        )
    lines += ["", "train step, one chip"] + report_memory(plan.memory)
    lines += ["", "FLOPs of a step, all chips"]
    lines.append(
        f"  model                 {plan.model_flops:.3e} (real tokens, no attention scores)"
    )
    lines.append(
        f"  program               {plan.traced_flops:.3e} (padding, attention, rematerialisation)"
    )
    if plan.collectives:
        lines += ["", "collectives of a step, one chip      GB sent    times"]
        lines += [f"  {row}" for row in report_collectives(plan.collectives)]
    if plan.host_transfers:
        lines.append(f"  WARNING: the step talks to the host: {', '.join(plan.host_transfers)}")
    return lines + (report_bounds(plan) if plan.memory.has_compiled else [])


def report_decoding(plan: DecodePlan) -> list[str]:
    """Lines: does decoding fit."""
    does, tokens = ("decode", "decoded") if plan.decodes else ("score", "in an answer")
    what = f"{plan.rows} rows of {plan.source_length} tokens, up to {plan.max_length} {tokens}"
    each = "a batch" if plan.decodes else "an answer of each row"
    flops_line = f"  model FLOPs           {plan.model_flops:.3e} {each}, all chips"
    where = f"one chip of the host's {plan.num_chips}" if plan.num_chips > 1 else "one chip"
    return ["", f"{does}, {where}: {what}", *report_memory(plan.memory), flops_line]


def report_memory(memory: Memory) -> list[str]:
    """Lines: bytes by kind, the peak and whether it fits."""
    rows = {**memory.kinds, "activations, other": memory.rest}
    lines = [f"  {name:<21} {size / GIB:8.3f} GiB" for name, size in rows.items()]
    word = "peak" if memory.has_compiled else "wanted"
    if memory.available is None:
        return [*lines, f"  {word:<21} {memory.peak / GIB:8.3f} GiB"]
    verdict = "fits" if memory.fits() else "DOES NOT FIT"
    if memory.fits() and not memory.fits(MARGIN):
        verdict = f"fits, with less than the {MARGIN:.0%} to spare that are advised"
    have = f"of {memory.available / GIB:.2f} GiB: {verdict}"
    return [*lines, f"  {word:<21} {memory.peak / GIB:8.3f} GiB {have}"]


def report_collectives(collectives: list[hlo.Collective]) -> list[str]:
    """A line for each kind and the axes it spans."""
    groups: dict[tuple, list[hlo.Collective]] = {}
    for collective in collectives:
        groups.setdefault((collective.kind, collective.axes), []).append(collective)
    lines = []
    for (kind, axes), members in sorted(groups.items()):
        sent = sum(c.sent_bytes * (c.times or 1) for c in members) / 1e9
        times = sum(c.times or 1 for c in members)
        unknown = (
            " (loops of unknown length count once)" if None in [c.times for c in members] else ""
        )
        lines.append(f"{kind:<18} {' × '.join(axes):<14} {sent:9.3f} {times:8,}{unknown}")
    return lines


def report_bounds(plan: TrainPlan) -> list[str]:
    """Lines: arithmetic intensity against the chip's roofs."""
    bounds, chip = plan.bounds(), plan.topology.chip
    if not bounds:
        return []
    per_chip = plan.traced_flops / plan.topology.num_chips
    binding = max(bounds, key=bounds.get)
    secs = bounds[binding]
    lines = ["", "roofs, one chip                      at least     FLOPs a byte, chip's own"]
    name = f"compute: {chip.peak_flops / 1e12:.0f} TFLOP/s bfloat16"
    lines.append(f"  {name:<34} {bounds['compute'] * 1e3:7.1f} ms")
    roofs = (
        ("memory", plan.hbm_bytes, chip.hbm_bandwidth),
        ("links", plan.sent_bytes, chip.link_bandwidth),
    )
    for roof, num_bytes, bandwidth in roofs:
        name = f"{roof}: {num_bytes / 1e9:.1f} GB at {bandwidth / 1e9:.0f} GB/s"
        line = f"  {name:<34} {bounds[roof] * 1e3:7.1f} ms"
        if num_bytes:  # one chip sends nothing
            line += f" {per_chip / num_bytes:8.0f} {chip.peak_flops / bandwidth:8.0f}"
        lines.append(line)
    most_mfu = plan.model_flops / secs / plan.topology.num_chips / chip.peak_flops
    lines.append(
        f"  {binding} binds: no step is shorter than {secs * 1e3:.1f} ms, so at most "
        f"{plan.run.shape.examples / secs:.1f} examples/s and {most_mfu:.0%} MFU. A bound, not a "
        "prediction."
    )
    return lines


def report_trial(trial: Trial) -> str:
    """A line: an override and what it leads to."""
    memory = trial.plan.memory
    verdict = "fits" if memory.fits() else "does not fit"
    return f"  {memory.peak / GIB:8.2f} GiB, {verdict:<12}  {' and '.join(trial.overrides)}"
