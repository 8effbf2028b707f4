"""The training loop: init → restore → loop (step, log, save).

Imports core, checkpoint, workdir and records. It is handed batches and never sees SeqIO:

    state = train(config, model, optimizer, mesh, stream=stream, run=RunDir(path))
"""

import dataclasses
import signal
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from tqdm import tqdm

from dslt import distributed
from dslt.checkpoint.layout import Layout
from dslt.checkpoint.manager import CheckpointManager
from dslt.checkpoint.student import read_params
from dslt.core import attention, flops, losses, sharding, t5, topology
from dslt.core.batch import Batch, BatchCounts
from dslt.core.optimizer import OptimizerConfig, make_optimizer, make_schedule
from dslt.core.sharding import MeshConfig
from dslt.core.t5 import T5Config
from dslt.core.train_step import StepMetrics, TrainState, init_state, train_step
from dslt.errors import InputError
from dslt.workdir import MetricsWriter, RunDir


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What one run does. The defaults are the paper's.

    Attributes:
      num_steps: updates in all.
      rationale_weight: λ of L_label + λ·L_rationale. 0 is fine-tuning or distillation: then no
        rationale row is built.
      seed: of the initial parameters, the data order and dropout.
      accumulation_steps: microbatches an update, for memory; the update is the same.
      init_from: a run's directory, one of its checkpoints, or a Hugging Face directory; empty
        starts from scratch.
      save_every_steps: between checkpoints; the last step is always saved.
      keep_checkpoints: the latest so many stay; the best one stays in `best/`.
      log_every_steps: between rows of metrics.jsonl; each row is a mean since the row before.
    """

    num_steps: int = 10_000
    rationale_weight: float = 1.0
    seed: int = 0
    accumulation_steps: int = 1
    init_from: str = ""
    save_every_steps: int = 1000
    keep_checkpoints: int = 3
    log_every_steps: int = 100

    def __post_init__(self):
        if self.rationale_weight < 0:
            raise InputError(
                f"TrainConfig.rationale_weight is {self.rationale_weight}; expected 0 or more"
            )
        counts = ("num_steps", "accumulation_steps", "save_every_steps", "log_every_steps")
        for field in (*counts, "keep_checkpoints"):
            if getattr(self, field) < 1:
                raise InputError(f"TrainConfig.{field} is {getattr(self, field)}; expected >= 1")


class BatchStream(Protocol):
    """Where batches come from; everything is a function of the step alone, so that a resumed run,
    on however many processes, sees what an undisturbed one would.

    Attributes:
      num_rows: of every global batch.
    """

    num_rows: int

    def batches(self, start_step: int, rows: np.ndarray) -> Iterator[Batch]:
        """These rows [n] of the global batches from a step on; past `num_rows` is padding."""

    def counts(self, step: int) -> BatchCounts:
        """Of the global batch of a step, the first being step 0."""


def train(
    config: TrainConfig,
    model_config: T5Config,
    optimizer_config: OptimizerConfig,
    mesh_config: MeshConfig,
    *,
    stream: BatchStream,
    run: RunDir,
) -> TrainState:
    """Trains to `config.num_steps`, or to a SIGTERM or SIGINT, and leaves a checkpoint there.

    Of several processes each builds the rows of its own devices, process 0 alone writes metrics,
    and all stop at the same step whichever gets the signal.

    Args:
      run: where metrics and checkpoints go. Where it has checkpoints, the newest is resumed.

    Raises:
      InputError: before anything compiles, where the start cannot be used.
    """
    distributed.check_joined()
    mesh = sharding.make_mesh(mesh_config)
    attention.check_platform(model_config.attention, mesh.devices.flat[0].platform)
    optimizer = make_optimizer(optimizer_config, config.num_steps)
    schedule = make_schedule(optimizer_config, config.num_steps)
    layout = Layout(model_config)

    keep = config.keep_checkpoints
    with CheckpointManager(run.checkpoints, keep, together=True) as manager:
        graphdef, state = initial_state(config, model_config, optimizer, mesh, manager)
        start = int(state.step)
        if start >= config.num_steps:
            print(f"Nothing to do: {run.path} has finished its {config.num_steps} steps.")
            set_state(run, "finished")
            return state
        step_fn = compile_step(config, optimizer_config, optimizer, graphdef, state, mesh)
        multiple = sharding.row_multiple(mesh, config.accumulation_steps)
        num_rows = -(-stream.num_rows // multiple) * multiple
        rows = sharding.local_rows(mesh, num_rows)
        writer = MetricsWriter(run, first_step=start + 1) if distributed.is_main() else None
        interval = LogInterval(model_config, mesh.size)
        batches = stream.batches(start, rows)
        anyone = distributed.AnyProcess(mesh)
        with StopRequest() as stop, tqdm(initial=start, total=config.num_steps, unit="step") as bar:
            for step in range(start + 1, config.num_steps + 1):
                batch = put_batch(next(batches), mesh, rows, num_rows)
                state, metrics = step_fn(state, batch)
                interval.add(stream.counts(step - 1), batch, metrics)
                bar.update()

                is_stopping = anyone.ask(stop.is_requested, metrics)
                is_last = step == config.num_steps or is_stopping
                if step % config.log_every_steps == 0 or is_last:
                    values = interval.summary() | {"learning_rate": float(schedule(step - 1))}
                    if writer:
                        writer.write(step, values)
                    bar.set_postfix_str(progress_line(values))
                if step % config.save_every_steps == 0 or is_last:
                    manager.save(state, layout)
                if is_stopping:
                    break
        if writer:
            writer.close()
        manager.wait()
    if step == config.num_steps:
        set_state(run, "finished")
    else:
        set_state(run, "stopped")
        name = stop.name or "another process's signal"
        print(f"Stopped on {name} after step {step}: saved. The same command resumes.")
    return state


def set_state(run: RunDir, state: str) -> None:
    """Says in run.json how far the run has come."""
    if distributed.is_main():
        run.update_info(state=state)


def initial_state(config, model_config, optimizer, mesh, manager) -> tuple:
    """The graph definition and the state to start from, placed on the mesh. The first that holds:

    1. this run has checkpoints: resume the newest;
    2. `init_from` is a run's directory or an Orbax checkpoint: its parameters, step 0;
    3. `init_from` is a Hugging Face directory: its parameters, step 0;
    4. from scratch, by `seed`.
    """
    graphdef, abstract = abstract_state(model_config, optimizer, mesh)
    if steps := distributed.share(manager.steps()):
        newest = newest_whole(manager, steps)
        manager.check_layout(newest, Layout(model_config))
        print(f"Resuming {manager.directory} after step {newest}.")
        return graphdef, manager.restore(newest, abstract)
    return new_state(config, model_config, optimizer, mesh)


def newest_whole(manager: CheckpointManager, steps: Sequence[int]) -> int:
    """The newest of these steps whose checkpoint is what was saved.

    Damaged ones after it are named and set aside, for their steps will be saved again. Each of
    several processes reads its share of the arrays, and all agree.

    Raises:
      InputError: none is whole; nothing is moved then, and nothing begins anew.
    """
    damaged = {}
    for step in reversed(steps):
        found = manager.find_damage(step, part=jax.process_index(), parts=jax.process_count())
        damages = [damage for damage in distributed.gather(found) if damage]
        if not damages:
            break
        damaged[step] = damages[0]
    else:
        raise InputError(
            f"{manager.directory}: none of its checkpoints is whole, so there is nothing to resume;"
            " restore one from a copy, or choose another --run_dir to begin anew:\n  "
            + "\n  ".join(damaged.values())
        )
    for other, damage in damaged.items():
        print(f"warning: {damage}")
        where = distributed.share(str(manager.set_aside(other)) if distributed.is_main() else None)
        print(f"warning: set aside as {where}; taking the checkpoint before it")
    manager.steps()  # all see what is left
    return step


def abstract_state(model_config: T5Config, optimizer, mesh) -> tuple:
    """The graph definition and a TrainState of `jax.ShapeDtypeStruct`s with their shardings."""
    graphdef, abstract_params = t5.abstract_params(model_config)
    abstract = jax.eval_shape(partial(init_state, optimizer=optimizer), abstract_params)
    return graphdef, sharding.with_shardings(mesh, abstract)


def new_state(config: TrainConfig, model_config: T5Config, optimizer, mesh) -> tuple:
    """As `initial_state`, of a run that has no checkpoints: 2, 3 or 4."""
    graphdef, abstract = abstract_state(model_config, optimizer, mesh)
    shardings = sharding.state_shardings(mesh, abstract)
    if config.init_from:
        print(f"Starting from the parameters in {config.init_from}.")
        params = read_params(Path(config.init_from), model_config, abstract.params)
    else:
        print(f"Starting from scratch with seed {config.seed}.")
        initialise = jax.jit(
            lambda: t5.init_params(model_config, config.seed)[1], out_shardings=shardings.params
        )
        params = initialise()
    make_state = jax.jit(partial(init_state, optimizer=optimizer), out_shardings=shardings)
    return graphdef, make_state(params)


def compile_step(config: TrainConfig, optimizer_config, optimizer, graphdef, state, mesh):
    """`train_step` under jit with shardings and a donated state."""
    shardings = sharding.state_shardings(mesh, state)
    step = partial(
        train_step,
        graphdef=graphdef,
        optimizer=optimizer,
        rationale_weight=config.rationale_weight,
        clip_norm=optimizer_config.clip_norm,
        seed=config.seed,
        accumulation_steps=config.accumulation_steps,
        mesh=mesh,
    )
    return jax.jit(
        step,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
        compiler_options=topology.compiler_options(mesh.devices.flat[0]),
    )


def put_batch(
    batch: Batch, mesh, rows: np.ndarray | None = None, num_rows: int | None = None
) -> Batch:
    """Numpy arrays, whole or of this process's `rows`, to global device arrays of `num_rows`."""
    return Batch(*(sharding.put_rows(array, mesh, rows, num_rows) for array in batch))


class LogInterval:
    """What to log of the steps since the last row. Device values are fetched at `summary` only."""

    def __init__(self, model_config: T5Config, num_devices: int):
        self.model_config = model_config
        peak = flops.peak_flops(jax.devices()[0])
        self.peak_flops = peak and peak * num_devices
        self._clear()

    def _clear(self) -> None:
        self.steps: list[StepMetrics] = []
        self.counts = np.zeros(3)  # examples, source tokens, target tokens
        self.room = np.zeros(2)  # source, target
        self.started_secs = time.perf_counter()

    def add(self, counts: BatchCounts, batch: Batch, metrics: StepMetrics) -> None:
        """Counts a global batch and keeps the device's results unfetched."""
        self.steps.append(metrics)
        self.counts += counts
        self.room += batch.encoder_segment_ids.size, batch.decoder_segment_ids.size

    def summary(self) -> dict[str, float]:
        """Means and rates over the interval; then a new interval begins."""
        steps = jax.device_get(self.steps)
        secs = time.perf_counter() - self.started_secs
        sums = losses.RoleSums(
            *(np.sum(x, axis=0) for x in zip(*(s.sums for s in steps), strict=True))
        )
        examples, source, target = self.counts.tolist()
        source_room, target_room = self.room.tolist()
        values = {"loss": float(np.mean([s.loss for s in steps]))}
        for role, name in enumerate(("label", "rationale")):
            tokens = float(sums.tokens[role])
            values[f"{name}_tokens"] = tokens
            if tokens:
                values[f"{name}_loss"] = float(sums.nll[role]) / tokens
                values[f"{name}_accuracy"] = float(sums.correct[role]) / tokens
        values |= {
            "grad_norm": float(np.mean([s.grad_norm for s in steps])),
            "source_fill": source / source_room,
            "target_fill": target / target_room,
            "examples_per_sec": examples / secs,
            "tokens_per_sec": (source + target) / secs,
        }
        if self.peak_flops:
            model_flops = flops.train_step_flops(self.model_config, source, target)
            values["mfu"] = model_flops / secs / self.peak_flops
        self._clear()
        return values


def progress_line(values: dict[str, float]) -> str:
    """What stands behind the progress bar."""
    shown = ("label_loss", "rationale_loss", "label_accuracy", "examples_per_sec")
    return ", ".join(f"{name}={values[name]:.3g}" for name in shown if name in values)


class StopRequest:
    """Inside it, the first SIGTERM or SIGINT asks for a stop; the second acts as ever."""

    def __init__(self):
        self.name = ""

    @property
    def is_requested(self) -> bool:
        return bool(self.name)

    def __enter__(self) -> "StopRequest":
        self._previous = {
            number: signal.signal(number, self._request)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_):
        self._restore()

    def _request(self, number, _frame):
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
