"""Which examples a step sees, and where each one lies in the packed rows. Numpy alone, no I/O.

A pair is the label segment of one example and, where there are some, its rationale segments; all
come to the same batch. The endless order of pairs is cut into windows of some hundreds to some
thousands of pairs, and a window is packed whole into its `window_batches` batches. Step k is batch
k % window_batches of window k // window_batches, so a batch is a function of (seed, step) and of
the lengths alone: nothing to save, and any host can build any step's rows.

    order = PairOrder(sizes=(8767,), rates=(8767.0,), batch_examples=64, seed=0)
    shape = RowShape(rows=14, source_length=424, target_length=152)
    plan = plan_window(lengths[order.window(0)], shape, order.window_batches, key=(0, 0))
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from dslt.core.batch import PAD_ID, ROLE_LABEL, ROLE_RATIONALE, Batch, empty_batch
from dslt.data.bins import assign
from dslt.errors import InputError

# Window loads must differ little for rows to be full: 2,048 pairs of SVAMP or CQA vary by 1 %.
WINDOW_PAIRS = 2048
MIN_WINDOW_BATCHES = 8
MAX_WINDOW_BATCHES = 128
MIXTURE_CYCLE = 65_536  # positions after which a mixture's pattern repeats; rates round to 1/65,536

START_IDS = {ROLE_LABEL: PAD_ID, ROLE_RATIONALE: PAD_ID}  # T5's; the source names the task


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The shape of every batch of a run: `rows` of `source_length` and `target_length` tokens."""

    rows: int
    source_length: int
    target_length: int


@dataclasses.dataclass(frozen=True)
class PairOrder:
    """The endless order of pairs over one or more datasets.

    Pair ids count through the datasets: those of dataset d start at sum(sizes[:d]). Each dataset
    goes through its own epochs, each in another permutation. Of every 65,536 positions each dataset
    gets its share exactly, and evenly spread.

    Attributes:
      sizes: pairs in each dataset, all above zero.
      rates: the share of each dataset, in any unit, all above zero.
      batch_examples: pairs a step, on average over a window.
      seed: another seed gives another order.
    """

    sizes: tuple[int, ...]
    rates: tuple[float, ...]
    batch_examples: int
    seed: int

    def __post_init__(self):
        if len(self.sizes) != len(self.rates) or not self.sizes:
            raise InputError(f"{len(self.sizes)} datasets and {len(self.rates)} rates; give equal")
        if min(self.sizes) < 1 or not all(0 < rate < float("inf") for rate in self.rates):
            raise InputError(
                f"sizes {self.sizes} and rates {self.rates}; expected all of them above zero"
            )
        if self.batch_examples < 1:
            raise InputError(f"batch_examples is {self.batch_examples}; expected at least 1")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; expected zero or more")

    @property
    def window_batches(self) -> int:
        """Batches a window: up to 2,048 pairs, but no more than an epoch if that is 8 batches."""
        pairs = min(sum(self.sizes), WINDOW_PAIRS)
        return min(max(pairs // self.batch_examples, MIN_WINDOW_BATCHES), MAX_WINDOW_BATCHES)

    @property
    def window_pairs(self) -> int:
        """Positions a window: `batch_examples` for each of its batches."""
        return self.window_batches * self.batch_examples

    def window(self, index: int) -> np.ndarray:
        """The pair ids of one window, [window_pairs] int64, dataset by dataset."""
        offsets = np.cumsum((0, *self.sizes))
        first = self.dataset_positions(index * self.window_pairs)
        last = self.dataset_positions((index + 1) * self.window_pairs)
        return np.concatenate(
            [
                offsets[dataset] + self._pairs(dataset, first[dataset], last[dataset])
                for dataset in range(len(self.sizes))
            ]
        )

    def dataset_positions(self, position: int) -> list[int]:
        """How many of the first `position` positions belong to each dataset."""
        cycles, rest = divmod(position, MIXTURE_CYCLE)
        return [
            cycles * len(slots) + int(np.searchsorted(slots, rest))
            for slots in _mixture_slots(self.rates)
        ]

    def _pairs(self, dataset: int, start: int, stop: int) -> np.ndarray:
        """Positions [start, stop) of one dataset's own endless order."""
        size = self.sizes[dataset]
        epochs = range(start // size, -(-stop // size))
        parts = [np.empty(0, np.int64)]
        for epoch in epochs:
            permutation = _permutation(self.seed, dataset, epoch, size)
            parts.append(permutation[max(start - epoch * size, 0) : stop - epoch * size])
        return np.concatenate(parts)


@functools.lru_cache(maxsize=16)
def _permutation(seed: int, dataset: int, epoch: int, size: int) -> np.ndarray:
    # Sorted raw bits: numpy promises PCG64's stream for good, but not Generator.permutation's.
    bits = np.random.PCG64(np.random.SeedSequence([seed, dataset, epoch])).random_raw(size)
    return np.argsort(bits, kind="stable").astype(np.int32)


@functools.lru_cache(maxsize=8)
def _mixture_slots(rates: tuple[float, ...]) -> list[np.ndarray]:
    """Which positions of a cycle each dataset takes, evenly spread; every dataset gets some."""
    shares = np.array(rates) / sum(rates) * MIXTURE_CYCLE
    counts = np.maximum(np.floor(shares).astype(int), 1)
    for dataset in np.argsort(counts - shares, kind="stable"):  # largest remainders first
        counts[dataset] += counts.sum() < MIXTURE_CYCLE
    counts[np.argmax(counts)] += MIXTURE_CYCLE - counts.sum()
    when = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    owner = np.repeat(np.arange(len(counts)), counts)[np.argsort(when, kind="stable")]
    return [np.flatnonzero(owner == dataset) for dataset in range(len(counts))]


@dataclasses.dataclass(frozen=True)
class Segments:
    """Where segments lie: arrays of one length, ordered by (batch, row, segment id).

    Attributes:
      pair: [n] int64, an index into the lengths that were planned.
      role: [n] int64, ROLE_LABEL or ROLE_RATIONALE.
      number: [n] int64, which of the pair's segments: 0 the label, k its k-th rationale.
      batch, row: [n] int64.
      segment_id: [n] int64, from 1 in each row.
      source_start, target_start: [n] int64, offsets in the row.
      source_length, target_length: [n] int64.
    """

    pair: np.ndarray
    role: np.ndarray
    number: np.ndarray
    batch: np.ndarray
    row: np.ndarray
    segment_id: np.ndarray
    source_start: np.ndarray
    target_start: np.ndarray
    source_length: np.ndarray
    target_length: np.ndarray

    def where(self, chosen: np.ndarray) -> "Segments":
        """The chosen segments alone; `chosen` is a mask or a slice."""
        return Segments(*(getattr(self, f.name)[chosen] for f in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class WindowPlan:
    """The segments of a window's batches, and the pairs that found no room: [k] int64, sorted."""

    segments: Segments
    left_out: np.ndarray


def plan_window(
    lengths: np.ndarray, shape: RowShape, batches: int, key: Sequence[int]
) -> WindowPlan:
    """Packs a window's pairs into its batches, all segments of a pair into the same batch.

    Pairs go to batches, and then segments to rows, largest first to where most room is left; then
    swaps repair what overflows. That packs both sides of CQA and SVAMP to 0.98; without the swaps
    one pair of CQA in seven was left over at 0.96. A pair that fits nowhere is left out.

    Args:
      lengths: [pairs, 2 + 2R] integers: label source and target, then those of up to R rationales;
        a pair with fewer has zeros there.
      shape: of every batch.
      batches: how many.
      key: integers that order the batches; loads are even, so only the identity of batches changes.
    """
    segment_sizes = lengths.reshape(len(lengths), -1, 2)  # [pairs, segments, source or target]
    capacity = np.array([shape.source_length, shape.target_length])
    pair_batch, _ = assign(segment_sizes.sum(1), capacity * shape.rows, batches)
    segment_row = np.full(segment_sizes.shape[:2], -1)
    room = np.tile(capacity, (batches, shape.rows, 1))
    evicted = []
    for batch in range(batches):
        pair, which = np.nonzero(
            (pair_batch == batch)[:, None] & (segment_sizes.sum(-1) > 0)
        )  # [n] each: the segments of this batch
        row, load = assign(segment_sizes[pair, which], capacity, shape.rows)
        segment_row[pair, which] = row
        room[batch] = capacity - load
        evicted += _evict(segment_sizes, segment_row, np.unique(pair), room[batch])
    left_out = [
        pair
        for pair in sorted(evicted, key=lambda pair: -segment_sizes[pair].sum())
        if not _insert(pair, segment_sizes, pair_batch, segment_row, room)
    ]
    shuffled = np.argsort(
        np.random.PCG64(np.random.SeedSequence(list(key))).random_raw(batches), kind="stable"
    )
    segments = _lay_out(segment_sizes, shuffled[pair_batch], segment_row, shape.rows)
    return WindowPlan(segments, np.array(sorted(left_out), np.int64))


@dataclasses.dataclass(frozen=True)
class TokenTable:
    """Token sequences behind one another: entry i is `tokens[offsets[i]:offsets[i + 1]]`.

    Attributes:
      tokens: [total] int32.
      offsets: [entries + 1] int64.
    """

    tokens: np.ndarray
    offsets: np.ndarray

    def take(self, entries: np.ndarray) -> "TokenTable":
        """A copy with these entries [n] in this order."""
        lengths = np.diff(self.offsets)[entries]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        starts = np.repeat(self.offsets[entries] - offsets[:-1], lengths)
        return TokenTable(self.tokens[starts + np.arange(offsets[-1])], offsets)


def share_sources(segments: Segments, lengths: np.ndarray) -> Segments:
    """Two targets to one source: splits segments that were planned with both targets in a row.

    Args:
      segments: planned from lengths of which the first target's is that of the label and the first
        rationale together, and the second source and target are zeros.
      lengths: [pairs, 2 + 2R] integers, as they are.

    Returns:
      The segments as planned, each label's followed by one of the same id with the first
      rationale's target and no source of its own. Further rationales keep sources of their own:
      targets of one role and id would see each other.
    """
    label, rationale = lengths[segments.pair, 1], lengths[segments.pair, 3]
    is_split = (segments.number == 0) & (rationale > 0)
    index = np.repeat(np.arange(len(segments.pair)), 1 + is_split)
    is_new = np.diff(index, prepend=-1) == 0
    is_label = (segments.number[index] == 0) & ~is_new
    segments = segments.where(index)
    target_length = np.where(is_label, label[index], segments.target_length)
    return dataclasses.replace(
        segments,
        role=np.where(is_label, ROLE_LABEL, ROLE_RATIONALE),
        number=np.where(is_new, 1, segments.number),
        target_start=segments.target_start + np.where(is_new, label[index], 0),
        source_length=np.where(is_new, 0, segments.source_length),
        target_length=np.where(is_new, rationale[index], target_length),
    )


def build_batch(
    segments: Segments,
    sources: Sequence[tuple[np.ndarray, np.ndarray, TokenTable, TokenTable]],
    shape: RowShape,
    rows: np.ndarray | None = None,
    start_ids: Mapping[int, int] = START_IDS,
    weights: np.ndarray | None = None,
) -> Batch:
    """Writes one batch's segments, or those of some of its rows, into arrays.

    Args:
      segments: those of one batch.
      sources: groups of segments that share token tables: the group's indices into `segments` [n],
        the table entry of each [n], the table of inputs and the table of targets.
      shape: of the whole batch.
      rows: [n] row numbers to build, each once and in this order; numbers from `shape.rows` on are
        rows of padding. All rows of the batch by default.
      start_ids: role to the token that the decoder starts with.
      weights: [segments] of their tokens in the loss; 1 by default.
    """
    rows = np.arange(shape.rows) if rows is None else np.asarray(rows)
    place = np.full(max(shape.rows, rows.max(initial=-1) + 1), -1)  # row of the batch -> row here
    place[rows] = np.arange(len(rows))
    batch = empty_batch(len(rows), shape.source_length, shape.target_length)
    row = place[segments.row]
    is_here = row >= 0
    source_cell = row * shape.source_length + segments.source_start
    target_cell = row * shape.target_length + segments.target_start
    example_id = np.unique(segments.pair, return_inverse=True)[1] + 1
    for index, entry, inputs, targets in sources:
        here = is_here[index]
        index, entry = index[here], entry[here]
        ids = segments.segment_id[index]
        length = segments.source_length[index]
        cells, ramp = _ramps(source_cell[index], length)
        batch.encoder_input_tokens.flat[cells] = inputs.tokens[_gather(inputs, entry, length, ramp)]
        batch.encoder_segment_ids.flat[cells] = np.repeat(ids, length)

        length = segments.target_length[index]
        cells, ramp = _ramps(target_cell[index], length)
        roles = np.repeat(segments.role[index], length)
        tokens = targets.tokens[_gather(targets, entry, length, ramp)]
        starts = np.select([roles == role for role in start_ids], list(start_ids.values()))
        batch.decoder_input_tokens.flat[cells] = np.where(ramp == 0, starts, np.roll(tokens, 1))
        batch.decoder_target_tokens.flat[cells] = tokens
        batch.decoder_segment_ids.flat[cells] = np.repeat(ids, length)
        batch.decoder_example_ids.flat[cells] = np.repeat(example_id[index], length)
        batch.decoder_loss_roles.flat[cells] = roles
        batch.decoder_loss_weights.flat[cells] = (
            1.0 if weights is None else np.repeat(weights[index], length)
        )
    return batch


def _ramps(start: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each i the cells start[i] + 0, 1, … length[i] - 1, and the 0, 1, … alone: [sum] each."""
    ends = np.cumsum(length)
    ramp = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - length, length)
    return np.repeat(start, length) + ramp, ramp


def _gather(table: TokenTable, entry: np.ndarray, length: np.ndarray, ramp: np.ndarray):
    return np.repeat(table.offsets[entry], length) + ramp


def _evict(
    sizes: np.ndarray, segment_row: np.ndarray, pairs: np.ndarray, room: np.ndarray
) -> list[int]:
    """Takes pairs out of a batch until no row overflows; updates `segment_row` and `room`."""
    evicted = []
    while (room < 0).any():
        row = int(room.min(1).argmin())
        there = [pair for pair in pairs if (segment_row[pair] == row).any()]
        pair = min(there, key=lambda pair: sizes[pair].sum())
        for which in range(segment_row.shape[1]):
            if segment_row[pair, which] >= 0:
                room[segment_row[pair, which]] += sizes[pair, which]
        segment_row[pair] = -1
        evicted.append(int(pair))
    return evicted


def _insert(
    pair: int,
    sizes: np.ndarray,
    pair_batch: np.ndarray,
    segment_row: np.ndarray,
    room: np.ndarray,
) -> bool:
    """Puts an evicted pair into the first batch whose rows have room; False if there is none."""
    for batch in range(len(room)):
        free = room[batch].copy()
        chosen = [-1] * sizes.shape[1]
        for which in np.argsort(-sizes[pair].sum(-1), kind="stable"):
            if not sizes[pair, which].any():
                continue
            fits = np.flatnonzero((free >= sizes[pair, which]).all(-1))
            if not len(fits):
                break
            chosen[which] = int(fits[0])
            free[fits[0]] -= sizes[pair, which]
        else:
            pair_batch[pair], segment_row[pair], room[batch] = batch, chosen, free
            return True
    return False


def _lay_out(
    sizes: np.ndarray, pair_batch: np.ndarray, segment_row: np.ndarray, rows: int
) -> Segments:
    """Puts the segments of each row one behind the other."""
    pair, which = np.nonzero(segment_row >= 0)
    batch, row = pair_batch[pair], segment_row[pair, which]
    order = np.lexsort((which, pair, row, batch))
    pair, which, batch, row = (array[order] for array in (pair, which, batch, row))
    place = batch * rows + row
    first = np.searchsorted(place, place)  # [n]: where each segment's row begins
    length = sizes[pair, which]
    before = np.cumsum(length, axis=0) - length
    start = before - before[first]
    return Segments(
        pair=pair,
        role=np.where(which == 0, ROLE_LABEL, ROLE_RATIONALE),
        number=which,
        batch=batch,
        row=row,
        segment_id=np.arange(len(pair)) - first + 1,
        source_start=start[:, 0],
        target_start=start[:, 1],
        source_length=length[:, 0],
        target_length=length[:, 1],
    )
