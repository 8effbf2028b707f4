"""What a run logs: means and rates of the steps since the row before, and loss spikes.

Imports core and nonfinite. The device's results are fetched where a row is written or a
checkpoint saved:

    interval = LogInterval(model_config, num_devices)
    interval.add(step, counts, batch, metrics)
    values = interval.summary()
"""

import collections
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from dslt.core import flops, losses
from dslt.core.batch import Batch, BatchCounts
from dslt.core.t5 import T5Config
from dslt.core.train_step import StepMetrics
from dslt.nonfinite import NonfiniteStep

# A step's loss is a spike where it is this many times the median of the last rows' losses, and so
# many nats per token above it, which noise around a small loss is not. Before FEWEST_ROWS there is
# no median to speak of.
SPIKE_FACTOR = 2.0
SPIKE_NATS = 0.5
SPIKE_ROWS = 20
FEWEST_ROWS = 5


class Step(NamedTuple):
    """What is known of a step before the device has done it.

    Attributes:
      number: from 1.
      counts: of the global batch.
      room: cells of it, source and target.
      metrics: on the device.
    """

    number: int
    counts: BatchCounts
    room: tuple[int, int]
    metrics: StepMetrics


class LogInterval:
    """What to log of the steps since the last row. Device values are fetched where they are asked
    for, not step by step.
    """

    def __init__(self, model_config: T5Config, num_devices: int, rows: Sequence[dict] = ()):
        """`rows` are those logged before, for what a spike is."""
        self.model_config = model_config
        peak = flops.peak_flops(jax.devices()[0])
        self.peak_flops = peak and peak * num_devices
        losses_before = [row["loss"] for row in rows if "loss" in row]
        self._losses = collections.deque(losses_before, SPIKE_ROWS)
        self._clear()

    def _clear(self) -> None:
        self.steps: list[Step] = []
        self._num_looked_at = 0
        self.started_secs = time.perf_counter()

    def add(self, number: int, counts: BatchCounts, batch: Batch, metrics: StepMetrics) -> None:
        """Counts a global batch and keeps the device's results unfetched."""
        room = batch.encoder_segment_ids.size, batch.decoder_segment_ids.size
        self.steps.append(Step(number, counts, room, metrics))

    def nonfinite(self, in_a_row: int) -> tuple[list[NonfiniteStep], int]:
        """Those of the steps since the last call that are not finite, and how many the last ones
        are in a row, where `in_a_row` were so before.
        """
        new = self.steps[self._num_looked_at :]
        self._num_looked_at = len(self.steps)
        found = []
        for step, is_finite in zip(
            new, jax.device_get([step.metrics.is_finite for step in new]), strict=True
        ):
            in_a_row = 0 if is_finite else in_a_row + 1
            if not is_finite:
                loss, grad_norm = float(step.metrics.loss), float(step.metrics.grad_norm)
                found.append(NonfiniteStep(step.number, loss, grad_norm))
        return found, in_a_row

    def summary(self) -> dict[str, float]:
        """Means over the finite steps and rates over all; then a new interval begins."""
        everything = jax.device_get([step.metrics for step in self.steps])
        secs = time.perf_counter() - self.started_secs
        steps = [metrics for metrics in everything if metrics.is_finite]
        examples, source, target = np.sum([step.counts for step in self.steps], axis=0).tolist()
        source_room, target_room = np.sum([step.room for step in self.steps], axis=0).tolist()
        values = {"loss": float(np.mean([s.loss for s in steps]))} if steps else {}
        sums = (
            losses.RoleSums(
                *(np.sum(x, axis=0) for x in zip(*(s.sums for s in steps), strict=True))
            )
            if steps
            else losses.RoleSums(*np.zeros((3, 2)))
        )
        for role, name in enumerate(("label", "rationale")):
            tokens = float(sums.tokens[role])
            values[f"{name}_tokens"] = tokens
            if tokens:
                values[f"{name}_loss"] = float(sums.nll[role]) / tokens
                values[f"{name}_accuracy"] = float(sums.correct[role]) / tokens
        if steps:
            values["grad_norm"] = float(np.mean([s.grad_norm for s in steps]))
        if any(s.consistency for s in steps):
            values["consistency_loss"] = float(np.mean([s.consistency for s in steps]))
        values |= {
            "skipped_steps": len(everything) - len(steps),
            "loss_spikes": self._spikes(everything),
            "source_fill": source / source_room,
            "target_fill": target / target_room,
            "examples_per_sec": examples / secs,
            "tokens_per_sec": (source + target) / secs,
        }
        if self.peak_flops:
            model_flops = flops.train_step_flops(self.model_config, source, target)
            values["mfu"] = model_flops / secs / self.peak_flops
        if "loss" in values:
            self._losses.append(values["loss"])
        self._clear()
        return values

    def _spikes(self, metrics: list[StepMetrics]) -> int:
        """Says which steps' losses are spikes, and counts them."""
        if len(self._losses) < FEWEST_ROWS:
            return 0
        median = float(np.median(self._losses))
        bound = max(SPIKE_FACTOR * median, median + SPIKE_NATS)
        spikes = [
            (step.number, float(found.loss))
            for step, found in zip(self.steps, metrics, strict=True)
            if found.is_finite and found.loss > bound
        ]
        for number, loss in spikes:
            tqdm.write(
                f"loss spike: {loss:.3g} at step {number}, {loss / median:.1f} times the median "
                f"of the last {len(self._losses)} rows"
            )
        return len(spikes)


def progress_line(values: dict[str, float]) -> str:
    """What stands behind the progress bar, or in its place where there is no terminal."""
    shown = ("label_loss", "rationale_loss", "label_accuracy", "examples_per_sec")
    return ", ".join(f"{name}={values[name]:.3g}" for name in shown if name in values)
