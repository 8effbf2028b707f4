"""Measures a run's speed on the devices at hand: input, train step, decoding, and a reference.

Imports core, checkpoint, train and records; it is handed batches and never sees SeqIO. Nothing is
written to a run's directory. The parameters are those that a new run would start from: fresh ones,
or those in `init_from`, whose answers end where a trained student's do.

    dslt bench settings/scratch.gin --gin "…records = ('runs/svamp/records/records.jsonl',)"
    dslt bench settings/scratch.gin --against hf

Rates count real tokens, never padding. Times are medians with minimum and maximum: of steps, and
where two programs are compared, of ratios between neighbours in time.
"""

import collections
import dataclasses
import itertools
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from dslt.checkpoint import hf_t5
from dslt.core import flops, hlo, sharding
from dslt.core.batch import PAD_ID, ROLE_LABEL, Batch, count_targets, pad_rows
from dslt.core.continuous import ContinuousDecoder
from dslt.core.decode import DecodeConfig
from dslt.core.optimizer import OptimizerConfig
from dslt.core.sharding import MeshConfig
from dslt.core.t5 import T5Config
from dslt.records import EvalInput
from dslt.start import mesh_and_optimizer, new_state
from dslt.train import TrainConfig, compile_step

PROFILED_STEPS = 3
MATMUL_SIZE = 2048  # of the products that measure a peak where no data sheet is known

# Named scopes in the model and the step, innermost first: where an operation's time is counted.
PARTS = ("attention", "feed_forward", "output_layer", "embedding", "norm", "optimizer")


@dataclasses.dataclass(frozen=True)
class Times:
    """Measured seconds, or ratios of them."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    def over(self, other: "Times") -> "Times":
        """The ratios to neighbours in time."""
        return Times(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({min(self.values):.3g}-{max(self.values):.3g})"


class DecodeJob(NamedTuple):
    """Inputs of one task, and how they are decoded.

    Attributes:
      rows: decoded at a time.
      max_length: tokens of an answer at most, EOS included.
      start_id: the decoder's first input.
    """

    name: str
    inputs: Sequence[np.ndarray]
    rows: int
    max_length: int
    start_id: int


class StepBench:
    """A compiled train step with its state; `loss` is that of the last one."""

    def __init__(
        self,
        config: TrainConfig,
        model_config: T5Config,
        optimizer_config: OptimizerConfig,
        mesh_config: MeshConfig,
        first_batch: Batch,
    ):
        self.mesh, optimizer = mesh_and_optimizer(
            config, model_config, optimizer_config, mesh_config
        )
        self.model_config = model_config
        self.graphdef, self._state = new_state(config, model_config, optimizer, self.mesh)
        self._multiple = sharding.row_multiple(self.mesh, config.accumulation_steps)
        step = compile_step(
            config, optimizer_config, optimizer, self.graphdef, self._state, self.mesh
        )
        started_secs = time.perf_counter()
        self.compiled = step.lower(self._state, self._place(first_batch)).compile()
        self.compile_secs = time.perf_counter() - started_secs

    @property
    def params(self) -> dict:
        return self._state.params

    def run(self, batch: Batch) -> float:
        """Seconds of one step, from numpy arrays to finished parameters."""
        started_secs = time.perf_counter()
        self._state, metrics = self.compiled(self._state, self._place(batch))
        jax.block_until_ready((self._state, metrics))
        secs = time.perf_counter() - started_secs
        self.loss = float(metrics.loss)
        return secs

    def _place(self, batch: Batch) -> Batch:
        return sharding.put_batch(pad_rows(batch, self._multiple), self.mesh)

    def peak_bytes(self) -> int:
        """Of one device, arguments included, as compiled."""
        return hlo.peak_bytes(self.compiled)


def bench(
    configs,
    *,
    batch: Callable[[int], Batch],
    inputs: Sequence[EvalInput],
    vocabulary: Path,
    against: str | None = None,
    steps: int = 10,
    repetitions: int = 3,
) -> Iterator[tuple[str, dict]]:
    """Measures input, train steps and decoding of a run.

    Args:
      configs: with `train`, `model`, `optimizer`, `mesh` and `evaluate`, each a dataclass.
      batch: the batch of a step.
      inputs: to decode; none leaves decoding out.
      vocabulary: the directory of the vocabulary, for the reference.
      against: `hf` for PyTorch's `transformers` beside it, or None.
      steps: measured train steps.
      repetitions: how often all inputs are decoded.

    Yields:
      A line to print and the figures in it, by name.
    """
    input_secs = _input_secs(batch, steps)
    batches = [batch(step) for step in range(steps + 1)]
    step = StepBench(configs.train, configs.model, configs.optimizer, configs.mesh, batches[0])
    reference = None
    with tempfile.TemporaryDirectory() as directory:
        if against:
            from dslt import bench_reference

            settings = save_reference(Path(directory) / "student", configs, step.params, vocabulary)
            reference = bench_reference.HuggingFaceT5(*settings)

        # Before train steps move the parameters away from those of the reference.
        for job in _decode_jobs(configs, inputs) if inputs else ():
            yield from _bench_decoding(job, step, repetitions, reference)

        if reference:
            yield "reference   is compiled by PyTorch, which may take minutes", {}
            reference, how = bench_reference.fastest(batches, *settings)
            yield f"reference   transformers T5, {how}", {"reference": how}
        secs, reference_secs = step_secs(step, batches, reference)
        yield f"input       {input_secs} s a batch, alone", {"input_secs": input_secs.values}
        yield from describe_steps(step, batches[1:], secs)
        part = f"{secs.median / input_secs.median:.1f}"
        yield f"            {part} times as long as preparing its batch", {}
        if reference_secs:
            faster = reference_secs.over(secs)
            yield (
                f"against hf  {reference_secs} s a step: dslt is {faster} times as fast",
                {"reference_step_secs": reference_secs.values, "step_ratio": faster.values},
            )
    shares = where_time_goes(step.compiled, lambda: step.run(batches[0]))
    text = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares if share > 0.005)
    graphs = "of CUDA graphs, not told apart; try XLA_FLAGS=--xla_gpu_enable_command_buffer="
    yield f"time        {text or graphs}", {"time_shares": dict(shares)}


def save_reference(directory: Path, configs, params: dict, vocabulary: Path) -> tuple:
    """Writes our weights for the reference; what `bench_reference.HuggingFaceT5` is made of."""
    hf_t5.save(directory, configs.model, jax.device_get(params), vocabulary)
    return directory, configs.model, configs.optimizer, configs.train.rationale_weight


def _input_secs(batch: Callable[[int], Batch], steps: int) -> Times:
    """Seconds a batch, planning included, with nothing else going on; the first is a warm-up."""
    batch(0)
    return Times(tuple(_timed(lambda step=step: batch(step))[0] for step in range(1, steps + 1)))


def step_secs(step: StepBench, batches: Sequence[Batch], reference) -> tuple[Times, Times | None]:
    """Seconds of each step and, where there is a reference, of its step on the same examples.

    A measured step follows one of the same program, on the batch before, as it does in training:
    a program that has just taken its turn finds the other's threads and caches.
    """
    programs = [step] if reference is None else [step, reference]

    def second_step(program, before: Batch, batch: Batch) -> float:
        program.run(before)
        return program.run(batch)

    rounds = [
        [second_step(program, *pair) for program in programs]
        for pair in itertools.pairwise(batches)
    ]
    ours, *theirs = (Times(column) for column in zip(*rounds, strict=True))
    return ours, theirs[0] if theirs else None


def describe_steps(
    step: StepBench, batches: Sequence[Batch], secs: Times
) -> Iterator[tuple[str, dict]]:
    """Rates, MFU and memory of measured steps."""
    examples = np.mean([count_targets(batch, ROLE_LABEL) for batch in batches])
    source = np.mean([np.count_nonzero(batch.encoder_segment_ids) for batch in batches])
    target = np.mean([np.count_nonzero(batch.decoder_segment_ids) for batch in batches])
    source_fill = source / batches[0].encoder_segment_ids.size
    target_fill = target / batches[0].decoder_segment_ids.size
    model_flops = flops.train_step_flops(step.model_config, source, target)
    peak, kind = peak_flops(step.mesh)
    rates = {
        "examples_per_sec": examples / secs.median,
        "tokens_per_sec": (source + target) / secs.median,
        "mfu": model_flops / secs.median / peak,
    }
    yield (
        f"train step  {secs} s, compiled in {step.compile_secs:.1f} s",
        {"step_secs": secs.values, "compile_secs": step.compile_secs},
    )
    yield (
        f"            {rates['examples_per_sec']:,.1f} examples/s, "
        f"{rates['tokens_per_sec']:,.0f} real tokens/s; rows filled {source_fill:.3f} and "
        f"{target_fill:.3f}",
        rates,
    )
    yield f"            MFU {100 * rates['mfu']:.1f} % of {kind}", {"peak_flops": peak}
    peak_bytes = step.peak_bytes()
    yield (
        f"            {peak_bytes / 1e6:,.0f} MB a device at the peak, arguments included",
        {"peak_bytes": peak_bytes},
    )


def _decode_jobs(configs, inputs: Sequence[EvalInput]) -> Iterator[DecodeJob]:
    """The labels and the rationales of these inputs, or both where they are one target."""
    evaluate, data = configs.evaluate, configs.data
    labels = [each.label_input_tokens for each in inputs]
    if data.target_layout != "label":
        length = max(evaluate.max_label_length, data.max_target_length)
        yield DecodeJob("answers", labels, evaluate.rows, length, PAD_ID)
        return
    yield DecodeJob("labels", labels, evaluate.rows, evaluate.max_label_length, PAD_ID)
    yield DecodeJob(
        "rationales",
        [each.rationale_input_tokens for each in inputs],
        evaluate.rows,
        evaluate.max_rationale_length,
        data.rationale_start_id,
    )


def _bench_decoding(
    job: DecodeJob, step: StepBench, repetitions: int, reference
) -> Iterator[tuple[str, dict]]:
    """Greedy decoding of all inputs, and the reference's beside it."""
    name, inputs, rows, max_length, start_id = job
    mesh = sharding.decoding_mesh(step.mesh, step.model_config.num_heads)
    decoder = ContinuousDecoder(step.graphdef, mesh, rows)
    where = sharding.state_shardings(mesh, step.params)
    prepared = decoder.prepare(jax.device_put(step.params, where))

    def ours():
        return decoder(
            prepared, inputs, config=DecodeConfig(), max_length=max_length, start_id=start_id
        )

    def theirs():
        return reference.generate(inputs, rows, max_length, start_id)

    programs = [ours] if reference is None else [ours, theirs]
    tokens = [program() for program in programs]  # compiles
    rounds = [[_timed(program)[0] for program in programs] for _ in range(repetitions)]
    secs = [Times(column) for column in zip(*rounds, strict=True)]
    total = sum(min(len(row) + 1, max_length) for row in tokens[0])  # with EOS
    yield (
        f"{name:<11} {len(inputs) / secs[0].median:,.1f} examples/s, "
        f"{total / secs[0].median:,.0f} tokens/s; {len(inputs)} inputs in {secs[0]} s",
        {f"{name}_secs": secs[0].values, f"{name}_tokens": total},
    )
    if reference is not None:
        same = sum(our == their for our, their in zip(*tokens, strict=True))
        faster = secs[1].over(secs[0])
        yield (
            f"against hf  {secs[1]} s: dslt is {faster} times as fast; {same} of {len(inputs)} "
            "answers are the same tokens",
            {f"{name}_ratio": faster.values, f"{name}_same": same},
        )


def peak_flops(mesh) -> tuple[float, str]:
    """FLOP/s of all devices of the mesh, and where the figure comes from."""
    known = flops.peak_flops(mesh.devices.flat[0])
    if known:
        return known * mesh.size, "the data sheet's bfloat16 peak"
    square = jax.numpy.ones((MATMUL_SIZE, MATMUL_SIZE), jax.numpy.float32)
    product = jax.jit(lambda x: x @ x)
    product(square).block_until_ready()
    secs = min(_timed(lambda: product(square).block_until_ready())[0] for _ in range(10))
    return 2 * MATMUL_SIZE**3 / secs, "the fastest float32 product of matrices measured here"


def where_time_goes(compiled, run: Callable[[], object]) -> list[tuple[str, float]]:
    """Part of the program to its share of all operations' time, the largest first.

    Operations are told apart by the named scopes that they were traced in; what has none, such as
    copies that the compiler adds, is `other`. Nothing where most of the time goes to CUDA graphs,
    whose profile has one name for many operations.
    """
    scope_of = _scopes(compiled.as_text())
    total: collections.Counter = collections.Counter()
    in_graphs = 0.0
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(PROFILED_STEPS):
                run()
        for path in Path(directory).rglob("*.xplane.pb"):
            for name, nanoseconds in _operations(path):
                if name in scope_of:
                    total[scope_of[name]] += nanoseconds
                elif name.startswith("command_buffer"):
                    in_graphs += nanoseconds
    everything = sum(total.values()) or 1
    if in_graphs > everything:
        return []
    return [(name, nanoseconds / everything) for name, nanoseconds in total.most_common()]


def _operations(path: Path):
    """(instruction, nanoseconds) of each operation in a profile."""
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                names = [value for key, value in event.stats if key == "hlo_op"]
                yield (names or [event.name])[0], event.duration_ns


def _scopes(program: str) -> dict[str, str]:
    """Instruction to the part of PARTS that it belongs to; loops stand for nothing themselves."""
    found = {}
    for instruction in itertools.chain(*hlo.parse_computations(program).values()):
        if instruction.opcode in ("while", "call", "conditional"):
            continue
        name = re.search(r'op_name="([^"]*)"', instruction.rest)
        scopes = re.findall(r"\w+", name[1]) if name else []
        stack = next((scope for scope in scopes if scope in ("encoder", "decoder")), "")
        part = next((part for part in PARTS if part in scopes), "other")
        is_in_stack = stack and part not in ("output_layer", "optimizer", "other")
        found[instruction.name] = f"{stack} {part}" if is_in_stack else part
    return found


def _timed(function: Callable[[], object]) -> tuple[float, object]:
    started_secs = time.perf_counter()
    result = function()
    return time.perf_counter() - started_secs, result
