"""The training loop: init → restore → loop (step, log, save).

Imports core, checkpoint and workdir. It is handed batches and never sees SeqIO:

    state = train(
        configs.train, configs.model, configs.optimizer, configs.mesh, stream=stream, run=run
    )
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from functools import partial
from typing import NoReturn, Protocol

import jax
import numpy as np
from tqdm import tqdm

from dslt import distributed, signals
from dslt.checkpoint.layout import Layout
from dslt.checkpoint.manager import CheckpointManager
from dslt.core import sharding, topology
from dslt.core.batch import Batch, BatchCounts
from dslt.core.optimizer import OptimizerConfig, make_schedule
from dslt.core.sharding import MeshConfig, put_batch
from dslt.core.t5 import T5Config
from dslt.core.train_step import (
    ON_NONFINITE,
    GradientSettings,
    TrainState,
    resumable,
    train_step,
)
from dslt.errors import InputError
from dslt.nonfinite import NonfiniteStep, keep_batch
from dslt.start import initial_state, mesh_and_optimizer
from dslt.step_log import LogInterval, progress_line
from dslt.workdir import MetricsWriter, RunDir

SHOWN_EXAMPLES = 10

MAX_SKIPPED_IN_A_ROW = 50  # steps that are not finite; after so many no single batch is to blame


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What one run does. The defaults are the paper's.

    Attributes:
      num_steps: updates in all.
      rationale_weight: λ of L_label + λ·L_rationale. 0 is fine-tuning or distillation: then no
        rationale row is built.
      seed: of the initial parameters, the data order and dropout.
      accumulation_steps: microbatches an update, for memory; the update is the same.
      consistency_weight: experimental, of a term that draws an example's label and its rationale
        together (core/consistency.py); 0 is the paper's objective.
      consistency_temperature: of that term.
      init_from: a run's directory, one of its checkpoints, or a Hugging Face directory, of the same
        vocabulary; empty starts from scratch.
      branch_from: a run's directory or one of its checkpoints, whose whole state (parameters,
        optimizer, step) this run goes on from, with its own config; the other run stays as it is.
      save_every_steps: between checkpoints; the last step is always saved.
      keep_checkpoints: the latest so many stay; the best one stays in `best/`.
      log_every_steps: between rows of metrics.jsonl; each row is a mean since the row before.
      on_nonfinite: what a step does whose loss or gradient is not finite. `stop`: the run ends,
        saved after the step before. `skip`: it changes no parameter, is counted, and the run goes
        on, unless MAX_SKIPPED_IN_A_ROW are so. Either keeps its batch in `nonfinite/STEP/`. Seen
        when a row is logged or a checkpoint saved.
    """

    num_steps: int = 10_000
    rationale_weight: float = 1.0
    seed: int = 0
    accumulation_steps: int = 1
    consistency_weight: float = 0.0
    consistency_temperature: float = 0.1
    init_from: str = ""
    branch_from: str = ""
    save_every_steps: int = 1000
    keep_checkpoints: int = 3
    log_every_steps: int = 100
    on_nonfinite: str = "stop"

    def __post_init__(self):
        if self.on_nonfinite not in ON_NONFINITE:
            raise InputError(
                f"TrainConfig.on_nonfinite is {self.on_nonfinite!r}; expected one of "
                f"{', '.join(ON_NONFINITE)}"
            )
        if self.rationale_weight < 0:
            raise InputError(
                f"TrainConfig.rationale_weight is {self.rationale_weight}; expected 0 or more"
            )
        if self.consistency_weight < 0 or self.consistency_temperature <= 0:
            raise InputError(
                f"TrainConfig.consistency_weight is {self.consistency_weight} and "
                f"consistency_temperature {self.consistency_temperature}; expected 0 or more, and "
                "above 0"
            )
        if self.consistency_weight and not self.rationale_weight:
            raise InputError(
                f"TrainConfig.consistency_weight is {self.consistency_weight} and rationale_weight "
                "is 0; expected rationales to be consistent with"
            )
        if self.consistency_weight and self.accumulation_steps > 1:
            raise InputError(
                f"TrainConfig.consistency_weight is {self.consistency_weight} and "
                f"accumulation_steps {self.accumulation_steps}; expected 1: an example's label and "
                "rationale may lie in two microbatches"
            )
        if self.init_from and self.branch_from:
            raise InputError(
                f"TrainConfig.init_from is {self.init_from!r} and branch_from is "
                f"{self.branch_from!r}; expected one of them: parameters alone, or the whole state"
            )
        counts = ("num_steps", "accumulation_steps", "save_every_steps", "log_every_steps")
        for field in (*counts, "keep_checkpoints"):
            if getattr(self, field) < 1:
                raise InputError(f"TrainConfig.{field} is {getattr(self, field)}; expected >= 1")

    def gradient_settings(self) -> GradientSettings:
        """Of these fields those that a gradient depends on."""
        names = [field.name for field in dataclasses.fields(GradientSettings)]
        return GradientSettings(**{name: getattr(self, name) for name in names})


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

    def examples(self, step: int) -> list[str]:
        """The ids of its examples."""


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
      InputError: before anything compiles, where the start cannot be used; and where steps that
        are not finite end the training.
    """
    distributed.check_joined()
    mesh, optimizer = mesh_and_optimizer(config, model_config, optimizer_config, mesh_config)
    schedule = make_schedule(optimizer_config, config.num_steps)
    layout = Layout(model_config)

    keep = config.keep_checkpoints
    with CheckpointManager(run.checkpoints, keep, together=True) as manager:
        graphdef, state = initial_state(config, model_config, optimizer, mesh, manager)
        start = int(state.step)
        if start >= config.num_steps and not run.has_checkpoints():
            raise InputError(
                f"{config.branch_from}: the branch begins at step {start}, and "
                f"train.TrainConfig.num_steps is {config.num_steps}; expected more steps than that"
            )
        if start >= config.num_steps:
            print(f"Nothing to do: {run.path} has finished its {config.num_steps} steps.")
            set_state(run, "finished")
            return state
        step_fn = compile_step(config, optimizer_config, optimizer, graphdef, state, mesh)
        multiple = sharding.row_multiple(mesh, config.accumulation_steps)
        num_rows = -(-stream.num_rows // multiple) * multiple
        rows = sharding.local_rows(mesh, num_rows)
        batches = (put_batch(b, mesh, rows, num_rows) for b in stream.batches(start, rows))
        first = next(batches)
        step_fn = step_fn.lower(state, first).compile()  # here a signal may end the process
        writer = None
        if distributed.is_main():
            resumed = start if run.has_checkpoints() else 0  # a branch has no rows of its own yet
            writer = MetricsWriter(run, first_step=resumed + 1)
        interval = LogInterval(model_config, mesh.size, writer.kept if writer else ())
        anyone = distributed.AnyProcess(mesh)
        in_a_row = 0
        with (
            signals.deferred() as stop,
            tqdm(
                initial=start,
                total=config.num_steps,
                unit="step",
                disable=distributed.hides_bars(),
            ) as bar,
        ):
            for step, batch in enumerate(itertools.chain([first], batches), start=start + 1):
                state, metrics = step_fn(state, batch)
                interval.add(step, stream.counts(step - 1), batch, metrics)
                bar.update()

                is_stopping = anyone.ask(stop.is_requested, metrics)
                is_last = step == config.num_steps or is_stopping
                is_logging = step % config.log_every_steps == 0 or is_last
                is_saving = step % config.save_every_steps == 0 or is_last
                if is_logging or is_saving:
                    found, in_a_row = interval.nonfinite(in_a_row)
                    if config.on_nonfinite == "stop":
                        found = found[:1]  # later steps met a halted state
                    keep_nonfinite(run, stream, found)
                    if found and config.on_nonfinite == "stop":
                        leave_halted(state, manager, layout, run, stream, found[0])
                    if in_a_row >= MAX_SKIPPED_IN_A_ROW:
                        save_once(manager, state, layout)
                        set_state(run, "stopped")
                        raise InputError(too_many_skipped(run, found[-1], in_a_row))
                if is_logging:
                    values = interval.summary() | {"learning_rate": float(schedule(step - 1))}
                    bar.set_postfix_str(progress_line(values))
                    if writer:
                        writer.write(step, values)
                        if bar.disable:  # no terminal: a line a row
                            line = f"step {step:,} of {config.num_steps:,}: {progress_line(values)}"
                            print(line, file=sys.stderr, flush=True)
                if is_saving:
                    manager.save(state, layout)
                if is_last:
                    break
            manager.wait()
        if writer:
            writer.close()
    if step == config.num_steps:
        set_state(run, "finished")
    else:
        set_state(run, "stopped")
        name = stop.name or "another process's signal"
        print(f"Stopped on {name} after step {step}: saved in {run.checkpoints / str(step)}.")
        print("The same command resumes.")
    return state


def keep_nonfinite(run: RunDir, stream: BatchStream, found: list[NonfiniteStep]) -> None:
    """Writes the batches of these steps, and says so."""
    if not distributed.is_main():
        return
    for each in found:
        batch = next(stream.batches(each.step - 1, np.arange(stream.num_rows)))
        kept = keep_batch(run, each, batch, stream.examples(each.step - 1))
        tqdm.write(f"not finite: {each}; " + (f"its batch is in {kept}" if kept else "not kept"))


def leave_halted(state, manager, layout, run, stream, first: NonfiniteStep) -> NoReturn:
    """Saves the state before the step that halted it, and raises InputError."""
    state = resumable(state)
    last = int(state.step)
    save_once(manager, state, layout)
    set_state(run, "stopped")
    examples = stream.examples(first.step - 1)
    shown = ", ".join(examples[:SHOWN_EXAMPLES]) + (", …" if len(examples) > SHOWN_EXAMPLES else "")
    directory = run.nonfinite(first.step)
    raise InputError(
        f"{first} is not finite. The run has stopped; what it has learnt until step {last} is "
        f"saved. The batch's {len(examples)} examples: {shown}. It lies in {directory}; "
        f"`dslt replay {directory}` says where it is not finite. To leave such steps out and go "
        "on: --gin \"train.TrainConfig.on_nonfinite = 'skip'\""
    )


def save_once(manager: CheckpointManager, state: TrainState, layout: Layout) -> None:
    """Saves a state that is not saved yet, and returns once it is."""
    manager.wait()
    if int(state.step) not in manager.steps():
        manager.save(state, layout)
        manager.wait()


def too_many_skipped(run: RunDir, last: NonfiniteStep, in_a_row: int) -> str:
    """Why a run ends although it may skip."""
    return (
        f"{last}; {in_a_row} steps in a row were not finite, so no single batch is to blame. What "
        f"the run has learnt before them is saved in {run.checkpoints}. "
        f"Batches of the first lie in {run.nonfinite(last.step).parent}. Look at them with "
        "`dslt replay`, or try a lower learning rate"
    )


def set_state(run: RunDir, state: str) -> None:
    """Says in run.json how far the run has come."""
    if distributed.is_main():
        run.set_state(state)


def compile_step(config: TrainConfig, optimizer_config, optimizer, graphdef, state, mesh):
    """`train_step` under jit with shardings and a donated state."""
    shardings = sharding.state_shardings(mesh, state)
    step = partial(
        train_step,
        graphdef=graphdef,
        optimizer=optimizer,
        settings=config.gradient_settings(),
        clip_norm=optimizer_config.clip_norm,
        on_nonfinite=config.on_nonfinite,
        mesh=mesh,
    )
    return jax.jit(
        step,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
        compiler_options=topology.compiler_options(mesh.devices.flat[0], is_training=True),
    )
