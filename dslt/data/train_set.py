"""What is learnt from one dataset: its train examples' tokens, label and rationales side by side.

train_set = open_train_set(index, "svamp", vocabulary, settings, cache_dir, use_rationales=True)
train_set.take_fraction(0.25, seed=0).lengths()
"""

import dataclasses
import os
from collections.abc import Mapping

import numpy as np

from dslt.data.packing import TokenTable
from dslt.data.token_cache import (
    LABEL_TASK,
    RATIONALE_TASK,
    SIDES,
    CachedTask,
    RecordsIndex,
    TaskSettings,
    open_task,
    task_name,
)
from dslt.data.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class TrainSet:
    """What is learnt from one dataset's train split: a pair an example.

    Attributes:
      name: the dataset.
      index: of its records file.
      label: inputs and targets of the label Task.
      label_entry: [pairs] int64, each pair's entry in `label`.
      rationale: those of the rationale Task, or None.
      rationale_entry: [pairs, R] int64, each pair's entries in `rationale`; -1 where it has fewer.
      rationale_weights: [entries] float32, of the entries of `rationale`.
      rows: [pairs] int64, rows of the records file.
      num_unlabelled: train examples that have no label and therefore are not learnt from.
      counts: Task name to the token, truncation and unknown counts of its train split.
    """

    name: str
    index: RecordsIndex
    label: tuple[TokenTable, TokenTable]
    label_entry: np.ndarray
    rationale: tuple[TokenTable, TokenTable] | None
    rationale_entry: np.ndarray
    rationale_weights: np.ndarray
    rows: np.ndarray
    num_unlabelled: int
    counts: Mapping[str, Mapping[str, int]]

    def lengths(self) -> np.ndarray:
        """[pairs, 2 + 2R] int64: label source and target, those of each rationale (0: none)."""
        entry = self.rationale_entry
        lengths = np.zeros((len(entry), 1 + entry.shape[1], 2), np.int64)
        for side, table in enumerate(self.label):
            lengths[:, 0, side] = np.diff(table.offsets)[self.label_entry]
        for side, table in enumerate(self.rationale or ()):
            lengths[:, 1:, side] = np.where(entry >= 0, np.diff(table.offsets)[entry], 0)
        return lengths.reshape(len(entry), -1)

    def take_fraction(self, fraction: float, seed: int) -> "TrainSet":
        """A share of the pairs, at least one, in their order; nested for a seed."""
        number = len(self.rows)
        order = np.random.default_rng((seed, number)).permutation(number)
        kept = np.sort(order[: max(1, round(fraction * number))])
        return dataclasses.replace(
            self,
            label_entry=self.label_entry[kept],
            rationale_entry=self.rationale_entry[kept],
            rows=self.rows[kept],
        )

    def shuffle_rationales(self, seed: int) -> "TrainSet":
        """Every rationale's target goes to another rationale's source, which of an example with
        several may be a sibling's."""
        if self.rationale is None:
            return self
        entries = np.unique(self.rationale_entry[self.rationale_entry >= 0])
        order = np.random.default_rng((seed, len(entries))).permutation(entries)
        source = np.arange(len(self.rationale_weights))
        source[order] = np.roll(order, 1)  # one cycle: nothing stays where it was
        inputs, targets = self.rationale
        return dataclasses.replace(self, rationale=(inputs, targets.take(source)))


def open_train_set(
    index: RecordsIndex,
    name: str,
    vocabulary: Vocabulary,
    settings: TaskSettings,
    cache_dir: str | os.PathLike,
    use_rationales: bool,
) -> TrainSet:
    """What the train split of one dataset teaches, from the token cache, which is built if need be.

    Args:
      name: of the dataset, one of `index`.
      use_rationales: whether its rationale Task is opened.
    """

    def open_train(task: str) -> CachedTask | None:
        return open_task(cache_dir, index, name, task, vocabulary, settings)

    cached = open_train(LABEL_TASK)
    label = cached.split("train")
    counts = {task_name(name, LABEL_TASK): cached.counts["train"]}
    entry = np.full((len(label.rows), 1), -1, np.int64)
    weights = np.ones(0, np.float32)
    tables = None
    cached = open_train(RATIONALE_TASK) if use_rationales else None
    if cached is not None and "train" in cached.counts:
        rationale = cached.split("train")
        counts[task_name(name, RATIONALE_TASK)] = cached.counts["train"]
        tables = (rationale.inputs, rationale.targets)
        weights = np.asarray(rationale.weights)
        first, end = (
            np.searchsorted(rationale.rows, label.rows, side)[:, None] for side in ("left", "right")
        )
        number = np.arange(max((end - first).max(initial=0), 1))
        entry = np.where(number < end - first, first + number, -1)
    return TrainSet(
        name=name,
        index=index,
        label=(label.inputs, label.targets),
        label_entry=np.arange(len(label.rows)),
        rationale=tables,
        rationale_entry=entry,
        rationale_weights=weights,
        rows=label.rows,
        num_unlabelled=index.counts[name]["train"]["examples"] - len(label.rows),
        counts=counts,
    )


def token_warnings(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Lines on what was cut or not understood; `counts` by Task name, as TrainSet has them."""
    lines = []
    for name, numbers in counts.items():
        for side in SIDES:
            noun = side.removesuffix("s")
            cut, unknown = numbers[f"truncated_{side}"], numbers[f"unknown_{side}"]
            if cut:
                lines.append(
                    f"warning: {name}: {cut} of {numbers['examples']} {side} are cut to "
                    f"max_{noun}_length"
                )
            if unknown:
                lines.append(
                    f"warning: {name}: {unknown} of {numbers[f'{noun}_tokens']} {noun} tokens are "
                    "unknown to the vocabulary"
                )
    return lines
