"""Compiles a run's train step and decode loop for hardware that is not there: what they need.

Imports core, and of train and evaluate what a run compiles. It is handed configs and sees no gin.

    plan = plan_training(run, parse_topology("v5e:4x8"))
    plan.memory.fits()

Nothing is executed: memory, FLOPs and bytes are those of the program, times are bounds.
"""

import dataclasses
import math
import os
import re
from functools import partial

import jax

from dslt.core import attention, flops, hlo, sharding, t5
from dslt.core.batch import Batch, empty_batch
from dslt.core.continuous import (
    KEPT_SHARE,
    ContinuousDecoder,
    kept_length,
    prepare,
    slot_shardings,
)
from dslt.core.decode import encode_sources, start_empty
from dslt.core.gpu_target import has_cudnn
from dslt.core.optimizer import OptimizerConfig, make_optimizer
from dslt.core.sharding import MeshConfig
from dslt.core.t5 import T5Config
from dslt.core.topology import GIB, Topology, compile_devices, one_host
from dslt.errors import InputError
from dslt.evaluate import EvalConfig
from dslt.start import abstract_state
from dslt.train import TrainConfig, compile_step

# Searches and trials compile with little effort: T5 Base on v5e:2x2 in 33 s for 166 s, its peak of
# memory 2.46 GiB for 2.52. Elsewhere the two have differed by up to 13 %.
QUICK = {"optimization_level": 9}  # XLA's O0
# Which of its Triton products are fastest, or run at all, XLA tries on a GPU; cuBLAS's need none.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
MARGIN = 0.12  # of a chip's memory, that a search leaves free


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The shape of a batch, and how much of it is real.

    Attributes:
      rows, source_length, target_length: of the packed rows, before rows are added for the devices.
      examples: a step, each with its label and perhaps its rationale.
      source_fill, target_fill: the share of their cells that hold tokens, in [0, 1].
      origin: where these numbers come from.
    """

    rows: int
    source_length: int
    target_length: int
    examples: int
    source_fill: float
    target_fill: float
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
      decodes: False where nothing is decoded: answers of `max_length` tokens are scored.
      model_flops: of a batch; where answers are scored, for one answer a row.
    """

    num_chips: int
    rows: int
    source_length: int
    max_length: int
    decodes: bool
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
    if run.model.attention == "cudnn" and (topology.is_estimate or not has_cudnn()):
        raise InputError(
            f"{topology}: T5Config.attention = 'cudnn' is compiled where cuDNN and a compiler for "
            "GPUs are installed; plan with 'flash_gpu', or pip install '.[gpu]' from a checkout"
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
            shape.source_fill * shape.rows * shape.source_length,
            shape.target_fill * shape.rows * shape.target_length,
        ),
        traced_flops=flops.traced_flops(traced.jaxpr.jaxpr),
        collectives=hlo.find_collectives(text, mesh.shape),
        host_transfers=hlo.find_host_transfers(text),
    )


def plan_decoding(
    run: Run, topology: Topology, quick: bool = False, hbm_bytes: int | None = None
) -> DecodePlan:
    """Compiles what `dslt evaluate` would decode, or score, its longest inputs with.

    Of several hosts each holds the whole student and decodes rows of its own, as
    `evaluate.Decoder` has it, so these are programs of one host's chips.
    """
    host = one_host(topology)  # a slice of its own: libtpu compiles for whole ones
    whole = sharding.make_mesh(run.mesh, compile_devices(topology))
    mesh = sharding.decoding_mesh(whole, run.model.num_heads, compile_devices(host))
    source_length = kept_length(run.max_input_length)
    max_length = run.evaluate.max_label_length
    if run.evaluate.with_rationales:
        max_length = max(max_length, run.evaluate.max_rationale_length)
    graphdef, params = t5.abstract_params(run.model)
    decoder = ContinuousDecoder(graphdef, mesh, run.evaluate.rows)
    params = jax.eval_shape(partial(t5.narrow_matrices, dtype=run.model.dtype), params)
    compile_one = partial(_compile, topology=host, mesh=mesh, quick=quick, hbm_bytes=hbm_bytes)
    memory = _decoding_memory(
        decoder, graphdef, params, run.evaluate, source_length, max_length, compile_one
    )
    return DecodePlan(
        num_chips=mesh.size,
        rows=decoder.rows,
        source_length=source_length,
        max_length=max_length,
        decodes=_decodes(run.evaluate),
        memory=memory,
        model_flops=flops.decode_flops(
            run.model, decoder.rows * source_length, decoder.rows * max_length
        ),
    )


def _decodes(config: EvalConfig) -> bool:
    """Whether anything is decoded, or answers of a set are scored alone."""
    return config.answers != "likelihood" or config.with_rationales


def _decoding_memory(
    decoder, graphdef, params, config: EvalConfig, source_length: int, max_length: int, compile_one
) -> Memory:
    """Of one chip, at the largest of the moments that follow one another."""
    mesh = decoder.mesh
    narrow = sharding.with_shardings(mesh, params)
    preparing = jax.jit(partial(prepare, graphdef=graphdef))
    with sharding.inside(mesh):
        prepared, memory = compile_one(preparing.lower(narrow), {})
        if not prepared:
            return memory
        params = jax.eval_shape(preparing, narrow)
        params = sharding.place_abstract(params, prepared.output_shardings)
    kinds = {"parameters": _bytes_a_chip(params)}
    # While parameters are prepared they are there twice.
    peak = _bytes_a_chip(narrow) + _beside_arguments(prepared)
    programs = []  # with what is there meanwhile
    if config.answers == "likelihood":
        tokens = _rows_of(mesh, decoder.rows, source_length)
        answers = _rows_of(mesh, decoder.rows, 1, config.max_label_length)  # one after the other
        with sharding.inside(mesh):
            scoring = decoder.score_answers.lower(params, tokens, answers, graphdef=graphdef)
        programs.append((scoring, params))
    if _decodes(config):
        encoding, running, slots, sources = _lower_decoding(
            decoder, graphdef, params, config, source_length, max_length
        )
        kinds["KV cache"] = _bytes_a_chip(slots.self_cache)
        kinds["cross keys and values"] = _bytes_a_chip(slots.sources.cross)
        # Encoded inputs wait while slots take steps; later ones are encoded beside slots.
        programs += [(encoding, (params, slots)), (running, (params, slots, sources))]
        # What slots have outgrown is there beside what takes its place: for longer sources three
        # quarters at most (see `kept_length`), for longer answers a half; or all, for fewer rows.
        outgrown = max(kinds["cross keys and values"] * 3 // 4, kinds["KV cache"] // 2)
        beside = max(_bytes_a_chip(sources) + outgrown, _bytes_a_chip(slots) // KEPT_SHARE)
        peak = max(peak, _bytes_a_chip((params, slots)) + beside)
    for lowered, alive in programs:
        compiled, memory = compile_one(lowered, kinds)
        if not compiled:
            return memory
        peak = max(peak, _bytes_a_chip(alive) + _beside_arguments(compiled))
    return Memory(kinds, max(peak, sum(kinds.values())), memory.available)


def _lower_decoding(decoder, graphdef, params, config, source_length: int, max_length: int):
    """What encodes inputs and what takes steps, not compiled yet, and their Slots and Sources."""
    where = slot_shardings(decoder.mesh)
    rows = decoder.num_encoded(decoder.rows)
    tokens, numbers = _rows_of(decoder.mesh, rows, source_length), _rows_of(decoder.mesh, rows)
    lengths = dict(cache_length=max_length, max_length=max_length)
    config = config.decoding()
    with sharding.inside(decoder.mesh):
        encode = partial(encode_sources, graphdef=graphdef)
        sources = jax.eval_shape(encode, params, tokens, numbers, numbers)
        start = partial(start_empty, rows=decoder.rows, config=config, **lengths)
        slots = sharding.place_abstract(jax.eval_shape(start, sources), where)
        sources = sharding.place_abstract(sources, where.sources)
        inputs = tokens, numbers, numbers, None
        encoding = decoder.encode.lower(params, *inputs, graphdef=graphdef)
        running = decoder.run.lower(params, slots, 0, graphdef=graphdef, config=config)
    return encoding, running, slots, sources


def _rows_of(mesh, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, "int32", sharding=sharding.batch_sharding(mesh))


def _beside_arguments(compiled) -> int:
    """Bytes that a program needs on one chip besides what it is given."""
    return hlo.peak_bytes(compiled) - compiled.memory_analysis().argument_size_in_bytes


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
    options = QUICK if quick and topology.is_tpu else {}
    if topology.is_gpu and not topology.is_estimate:
        options = GPU_OPTIONS
    try:
        compiled = lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        if "No PTX compilation provider" in str(error):
            raise InputError(
                f"{topology}: compiling for GPUs needs CUDA's ptxas; install it with "
                "pip install '.[plan]' from a checkout"
            ) from None
        wanted = _wanted_bytes(str(error))
        if wanted is None:
            raise
        compiled, peak = None, wanted
    else:
        peak = hlo.peak_bytes(compiled)
    # What is donated and gathered may free the gradients' place: no kind is larger than the peak.
    peak = max(peak, sum(kinds.values()))
    return compiled, Memory(kinds, peak, available, has_compiled=compiled is not None)


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
