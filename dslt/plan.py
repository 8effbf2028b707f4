"""Compiles a run's train step and decode loop for hardware that is not there: what they need.

Imports core, and of train and evaluate what a run compiles. It is handed configs and sees no gin.

    plan = plan_training(run, parse_topology("v5e:4x8"))
    print("\\n".join(report_training(plan)))

Nothing is executed: memory, FLOPs and bytes are those of the program, times are bounds.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator
from functools import partial

import jax

from dslt.core import attention, flops, hlo, sharding, t5
from dslt.core.batch import Batch, empty_batch
from dslt.core.continuous import kept_length, prepare
from dslt.core.decode import decode_batch
from dslt.core.optimizer import OptimizerConfig, make_optimizer
from dslt.core.sharding import MeshConfig
from dslt.core.t5 import T5Config
from dslt.core.topology import (
    GIB,
    Topology,
    compile_devices,
    compiler_options,
    one_host,
    slices,
)
from dslt.errors import InputError
from dslt.evaluate import EvalConfig
from dslt.start import abstract_state
from dslt.train import TrainConfig, compile_step

# Searches and trials compile with little effort: T5 Base on v5e:2x2 in 33 s for 166 s, its peak of
# memory 2.46 GiB for 2.52. Elsewhere the two have differed by up to 13 %.
QUICK = {"optimization_level": 9}  # XLA's O0
MARGIN = 0.12  # of a chip's memory, that a search leaves free
MOST_TRIALS = 6  # compilations to find the largest batch


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The shape of a batch, and how much of it is real.

    Attributes:
      rows, source_length, target_length: of the packed rows, before rows are added for the devices.
      examples: a step, each with its label and perhaps its rationale.
      fill: the share of the cells that hold tokens, in [0, 1].
      origin: where these numbers come from.
    """

    rows: int
    source_length: int
    target_length: int
    examples: int
    fill: float
    origin: str

    def scaled(self, examples: int) -> "BatchShape":
        """The same rows for another number of examples."""
        rows = -(-self.rows * examples // self.examples)
        return dataclasses.replace(self, rows=rows, examples=examples)


@dataclasses.dataclass(frozen=True)
class Run:
    """What is planned: a run's configs and the shape of its batches."""

    train: TrainConfig
    model: T5Config
    optimizer: OptimizerConfig
    mesh: MeshConfig
    evaluate: EvalConfig
    max_input_length: int
    shape: BatchShape


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip. `peak` is the compiler's, the other kinds are arithmetic on the shardings.

    Attributes:
      kinds: name to bytes of what is there during the whole step.
      peak: the most that is there at a time; where the program does not fit, what it wanted.
      available: what a program may use; None where nothing is known to bound it.
      has_compiled: False where the compiler gave up for want of memory.
    """

    kinds: dict[str, int]
    peak: int
    available: int | None
    has_compiled: bool = True

    @property
    def rest(self) -> int:
        """Activations, and whatever else is temporary."""
        return self.peak - sum(self.kinds.values())

    def fits(self, margin: float = 0.0) -> bool:
        within = self.available is None or self.peak <= self.available * (1 - margin)
        return self.has_compiled and within


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """A compiled train step.

    Attributes:
      mesh_shape: axis to size.
      rows: of the global batch, padded for the devices.
      model_flops: a step's, over all chips, of real tokens: the formula of `core.flops`.
      traced_flops: likewise of the program: with padding, attention scores and rematerialisation.
      collectives: of one chip; empty where the program does not fit.
      host_transfers: what of the step talks to the host; none is expected.
    """

    run: Run
    topology: Topology
    mesh_shape: dict[str, int]
    rows: int
    memory: Memory
    model_flops: float
    traced_flops: float
    collectives: list[hlo.Collective]
    host_transfers: list[str]

    @property
    def sent_bytes(self) -> float:
        """A step's, of one chip."""
        return sum(c.sent_bytes * (c.times or 1) for c in self.collectives)

    @property
    def hbm_bytes(self) -> float:
        """At least so many bytes pass between a chip and its memory in a step.

        State is read and written once, what is temporary at the peak is written and read once, and
        so is what other chips send. Activations that come and go are left out.
        """
        state = sum(self.memory.kinds.values())
        received = sum(c.sent_bytes * (c.times or 1) for c in self.collectives)
        return 2.0 * (state + max(self.memory.rest, 0) + received)

    def bounds(self) -> dict[str, float]:
        """Seconds that a step takes at least, by what bounds it; empty for unknown chips."""
        chip = self.topology.chip
        if not (chip.peak_flops and chip.hbm_bandwidth and chip.link_bandwidth):
            return {}
        return {
            "compute": self.traced_flops / self.topology.num_chips / chip.peak_flops,
            "memory": self.hbm_bytes / chip.hbm_bandwidth,
            "links": self.sent_bytes / chip.link_bandwidth,
        }


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """A compiled decode loop of `rows` rows, `source_length` and `max_length` tokens each.

    Attributes:
      num_chips: that it runs on, those of one host.
    """

    num_chips: int
    rows: int
    source_length: int
    max_length: int
    memory: Memory
    model_flops: float


def plan_training(
    run: Run, topology: Topology, quick: bool = False, hbm_bytes: int | None = None
) -> TrainPlan:
    """Compiles the step that `dslt train` would run.

    Args:
      quick: compile with little effort.
      hbm_bytes: of a chip, in place of what is known of it.

    Raises:
      InputError: the mesh or the model's attention does not fit the topology, or its compiler is
        missing.
    """
    attention.check_platform(run.model.attention, topology.platform)
    if topology.chip.is_estimate and run.model.attention == "cudnn":
        raise InputError(
            f"{topology}: is estimated from the program of CPUs, for which there is no cuDNN; plan "
            "with T5Config.attention = 'plain'"
        )
    mesh = sharding.make_mesh(run.mesh, compile_devices(topology))
    optimizer = make_optimizer(run.optimizer, run.train.num_steps)
    graphdef, state = abstract_state(run.model, optimizer, mesh)
    multiple = sharding.row_multiple(mesh, run.train.accumulation_steps)
    rows = -(-run.shape.rows // multiple) * multiple
    batch = _abstract_batch(rows, run.shape, mesh)

    step = compile_step(run.train, run.optimizer, optimizer, graphdef, state, mesh)
    traced = step.trace(state, batch)
    kinds = {
        "parameters": _bytes_a_chip(state.params),
        "optimizer state": _bytes_a_chip((state.opt_state, state.step)),
        "batch": _bytes_a_chip(batch),
        "gradients": _bytes_a_chip(state.params),
    }
    compiled, memory = _compile(traced.lower(), kinds, topology, mesh, quick, hbm_bytes)
    text = compiled.as_text() if compiled else ""
    shape = run.shape
    return TrainPlan(
        run=run,
        topology=topology,
        mesh_shape=dict(mesh.shape),
        rows=rows,
        memory=memory,
        model_flops=flops.train_step_flops(
            run.model,
            shape.fill * shape.rows * shape.source_length,
            shape.fill * shape.rows * shape.target_length,
        ),
        traced_flops=flops.traced_flops(traced.jaxpr.jaxpr),
        collectives=hlo.find_collectives(text, mesh.shape),
        host_transfers=hlo.find_host_transfers(text),
    )


def plan_decoding(
    run: Run, topology: Topology, quick: bool = False, hbm_bytes: int | None = None
) -> DecodePlan:
    """Compiles the decode loop that `dslt evaluate` would run on its longest inputs.

    Of several hosts each holds the whole student and decodes rows of its own, as
    `evaluate.Decoder` has it, so this is a program of one host's chips.
    """
    host = one_host(topology)  # a slice of its own: libtpu compiles for whole ones
    whole = sharding.make_mesh(run.mesh, compile_devices(topology))
    mesh = sharding.local_mesh(whole, compile_devices(host))
    multiple = sharding.row_multiple(mesh)
    rows = -(-run.evaluate.rows // multiple) * multiple
    source_length = kept_length(run.max_input_length)
    max_length = run.evaluate.max_label_length
    if run.evaluate.with_rationales:
        max_length = max(max_length, run.evaluate.max_rationale_length)

    graphdef, params = t5.abstract_params(run.model)
    params = jax.eval_shape(partial(t5.narrow_matrices, dtype=run.model.dtype), params)
    params = sharding.with_shardings(mesh, params)
    prepared = jax.jit(partial(prepare, graphdef=graphdef))
    with sharding.inside(mesh):
        placed = prepared.lower(params).compile()
    prepared = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        jax.eval_shape(prepared, params),
        placed.output_shardings,
    )
    tokens = jax.ShapeDtypeStruct(
        (rows, source_length), "int32", sharding=sharding.batch_sharding(mesh)
    )
    decode = jax.jit(
        partial(decode_batch, graphdef=graphdef, config=run.evaluate.decoding()),
        static_argnames=("max_length",),
        compiler_options=compiler_options(mesh.devices.flat[0]),
    )
    with sharding.inside(mesh):
        lowered = decode.lower(prepared, tokens, max_length=max_length)
    kinds = {
        "parameters": _bytes_a_chip(prepared),
        "KV cache": cache_bytes(run.model, rows * run.evaluate.beams, max_length) // multiple,
        "cross keys and values": cache_bytes(run.model, rows, source_length) // multiple,
    }
    _, memory = _compile(lowered, kinds, host, mesh, quick, hbm_bytes)
    return DecodePlan(
        num_chips=mesh.size,
        rows=rows,
        source_length=source_length,
        max_length=max_length,
        memory=memory,
        model_flops=flops.decode_flops(run.model, rows * source_length, rows * max_length),
    )


def cache_bytes(config: T5Config, rows: int, length: int) -> int:
    """Of the decoder's keys and values over `length` positions of all rows, on all chips."""
    width = 2 if config.dtype == "bfloat16" else 4
    per_position = 2 * config.num_decoder_layers * config.num_heads * config.d_kv * width
    return rows * length * per_position


def _abstract_batch(rows: int, shape: BatchShape, mesh) -> Batch:
    where = sharding.batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, x.shape[1]), x.dtype, sharding=where),
        empty_batch(1, shape.source_length, shape.target_length),
    )


def _bytes_a_chip(tree) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _compile(lowered, kinds: dict[str, int], topology: Topology, mesh, quick: bool, hbm_bytes):
    """The executable, None where it does not fit, and its memory."""
    available = hbm_bytes or topology.chip.hbm_bytes
    if topology.version == "cpu" and not available:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // mesh.size
    options = (QUICK if quick and topology.is_tpu else {}) or None
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        wanted = _wanted_bytes(str(error))
        if wanted is None:
            raise
        return None, Memory(kinds, wanted, available, has_compiled=False)
    peak = hlo.peak_bytes(compiled)
    # What is donated and gathered may free the gradients' place: no kind is larger than the peak.
    return compiled, Memory(kinds, max(peak, sum(kinds.values())), available)


def _wanted_bytes(message: str) -> int | None:
    """What a compiler that ran out of memory says that it wanted."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    units = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    found = re.search(r"Used ([\d.]+)([KMGT]) of|required[^(]*\(([\d.]+)([KMGT])\)", message)
    if not found:
        return None
    number, unit = [part for part in found.groups() if part]
    return int(float(number) * units[unit])


# ---------------------------------------------------------------------------------------------
# What to change, what is possible


@dataclasses.dataclass(frozen=True)
class Trial:
    """A run with some overrides, compiled."""

    overrides: tuple[str, ...]
    plan: TrainPlan


def suggest(plan: TrainPlan, hbm_bytes: int | None = None) -> Iterator[Trial]:
    """Compiles changes of a run that does not fit: each alone, then together until it fits."""
    changes = list(_changes(plan))
    fitting = False
    for override, change in changes:
        trial = _try(plan, ((override, change),), hbm_bytes)
        fitting |= trial.plan.memory.fits()
        yield trial
    if fitting:
        return
    for count in range(2, len(changes) + 1):
        trial = _try(plan, changes[:count], hbm_bytes)
        yield trial
        if trial.plan.memory.fits():
            return


def _changes(plan: TrainPlan) -> Iterator[tuple[str, Callable[[Run], Run]]]:
    """Overrides that spare memory and are not in place yet, the cheapest in time first."""
    run = plan.run

    def change(field: str, **values) -> Callable[[Run], Run]:
        return lambda run: dataclasses.replace(
            run, **{field: dataclasses.replace(getattr(run, field), **values)}
        )

    if run.model.dtype == "float32":
        yield "t5.T5Config.dtype = 'bfloat16'", change("model", dtype="bfloat16")
    if plan.mesh_shape["data"] > 1:
        text = "sharding.MeshConfig.data = 1 and sharding.MeshConfig.fsdp = -1"
        yield text, change("mesh", data=1, fsdp=-1)
    if not run.model.remat:
        yield "t5.T5Config.remat = True", change("model", remat=True)
    if run.optimizer.name == "adamw":
        yield "optimizer.OptimizerConfig.name = 'adafactor'", change("optimizer", name="adafactor")
    devices = plan.mesh_shape["data"] * plan.mesh_shape["fsdp"]
    microbatches = run.train.accumulation_steps
    while microbatches * 2 * devices <= plan.rows:
        microbatches *= 2
    if microbatches > run.train.accumulation_steps:
        text = f"train.TrainConfig.accumulation_steps = {microbatches}"
        yield text, change("train", accumulation_steps=microbatches)
    if run.shape.examples > 1 and plan.rows > devices:
        half = run.shape.examples // 2
        text = f"pipeline.DataConfig.batch_examples = {half}"
        yield text, lambda run: dataclasses.replace(run, shape=run.shape.scaled(half))


def _try(plan: TrainPlan, changes, hbm_bytes) -> Trial:
    run = plan.run
    for _, change in changes:
        run = change(run)
    names = tuple(name for name, _ in changes)
    return Trial(names, plan_training(run, plan.topology, quick=True, hbm_bytes=hbm_bytes))


def largest_batch(
    run: Run, topology: Topology, hbm_bytes: int | None = None, say: Callable = print
) -> TrainPlan | None:
    """The plan of the largest batch that fits with MARGIN to spare; None where not one row does.

    Memory is nearly a line over the rows, so a trial lies where the line through the two largest
    says until one does not fit, and then in the middle; at most MOST_TRIALS, to one row a device.
    """
    mesh = sharding.make_mesh(run.mesh, compile_devices(topology))
    multiple = sharding.row_multiple(mesh, run.train.accumulation_steps)

    def attempt(count: int) -> TrainPlan:
        rows = count * multiple
        examples = max(rows * run.shape.examples // run.shape.rows, 1)
        shape = dataclasses.replace(run.shape, rows=rows, examples=examples)
        found = plan_training(
            dataclasses.replace(run, shape=shape), topology, quick=True, hbm_bytes=hbm_bytes
        )
        points[count] = found
        say(f"  {examples} examples in {rows} rows: {found.memory.peak / GIB:.2f} GiB a chip")
        return found

    points: dict[int, TrainPlan] = {}
    attempt(1)
    attempt(max(2, -(-run.shape.rows // multiple)))
    while len(points) < MOST_TRIALS:
        fitting = [count for count, plan in points.items() if plan.memory.fits(MARGIN)]
        others = [count for count in points if count not in fitting]
        low, high = max(fitting, default=0), min(others, default=math.inf)
        if not low or high - low <= 1:
            break
        guess = (low + high) // 2 if others else _where_full(points, 1 - MARGIN)
        attempt(max(guess, low + 1))
    fitting = [count for count, plan in points.items() if plan.memory.fits(MARGIN)]
    return points[max(fitting)] if fitting else None


def _where_full(points: dict[int, TrainPlan], share: float) -> int:
    """Rows a device at which the line through the two largest compiled plans meets the limit."""
    (x0, first), (x1, last) = sorted(points.items())[-2:]
    slope = (last.memory.peak - first.memory.peak) / (x1 - x0)
    room = last.memory.available * share - last.memory.peak
    return math.floor(x1 + room / slope) if slope > 0 else x1 * 2


def smallest_slice(
    run: Run, topology: Topology, hbm_bytes: int | None = None, say: Callable = print
) -> TrainPlan | None:
    """The plan on the smallest slice of this generation that the run fits with MARGIN to spare."""
    for candidate in slices(topology.version):
        try:
            found = plan_training(run, candidate, quick=True, hbm_bytes=hbm_bytes)
        except InputError as error:  # the mesh's sizes are for other slices
            say(f"  {candidate}: {error}")
            continue
        fits = found.memory.fits(MARGIN)
        say(f"  {candidate}: {found.memory.peak / GIB:.2f} GiB a chip, {'fits' if fits else 'no'}")
        if fits:
            return found
    return None


# ---------------------------------------------------------------------------------------------
# What is printed


def report_training(plan: TrainPlan) -> list[str]:
    """Lines: does it fit, what it computes, what it sends, what bounds it."""
    shape, topology = plan.run.shape, plan.topology
    mesh = " × ".join(f"{name} {size}" for name, size in plan.mesh_shape.items() if size > 1)
    lines = [
        f"topology    {topology}: {topology.num_chips} chips, mesh {mesh or 'of one device'}",
        f"batch       {shape.examples} examples in {plan.rows} rows of {shape.source_length} and "
        f"{shape.target_length} tokens, fill {shape.fill:.2f} ({shape.origin})",
    ]
    if topology.chip.is_estimate:
        lines.append(
            "ESTIMATE    compiled for the CPU: a GPU's compiler fuses and lays out otherwise"
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
    what = f"{plan.rows} rows of {plan.source_length} tokens, up to {plan.max_length} decoded"
    flops_line = f"  model FLOPs           {plan.model_flops:.3e} a batch, all chips"
    where = f"one chip of the host's {plan.num_chips}" if plan.num_chips > 1 else "one chip"
    return ["", f"decode, {where}: {what}", *report_memory(plan.memory), flops_line]


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
