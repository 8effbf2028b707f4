"""The rows that a batch should have, from the data's lengths. Numpy alone, no I/O.

shape = suggest_row_shape(order, lengths)
"""

import dataclasses

import numpy as np

from dslt.data.packing import PairOrder, RowShape, plan_window
from dslt.errors import InputError

SOURCE_LENGTHS = (256, 320, 384, 512)  # what a suggested row's source length is near
TARGET_COST = 2  # of a target's cell, in source cells: it has the output layer and two attentions
ATTENTION_LENGTH = 4096  # positions to attend to that cost about as much as all else of a cell
LENGTH_MULTIPLE = 8
SHAPE_WINDOWS = 64  # how many windows' loads a suggestion looks at
TRIED_WINDOWS = 4  # how many of them, the heaviest, it packs
SPARED = 0.005  # the share of a side that they must leave free, for windows not looked at
MIN_ROW_SEGMENTS = np.array([2, 1])  # of the longest, source and target, a row must hold
MAX_FILL = 0.99  # above it packing is not even tried: it would fail, and slowly
MIN_FILL = 0.9  # below it a suggestion adds rows and no longer lengthens them


def suggest_row_shape(
    order: PairOrder,
    lengths: np.ndarray,
    source_length: int | None = None,
    target_length: int | None = None,
) -> RowShape:
    """The row shape that fills both sides: a function of the data and the batch, not of the seed.

    Tried are numbers of rows with a source length near one of SOURCE_LENGTHS (longer where single
    segments are long), or those that follow from the lengths that are given. Free lengths are then
    the least multiples of 8 with which the heaviest of the first 64 windows are packed without a
    rest. Taken is the shape that costs least, counting cells and what they attend to.

    Args:
      order: the pairs' order; its seed plays no role.
      lengths: [all pairs, 2 + 2R] integers, as in `plan_window`.
      source_length, target_length: to be kept as they are, if given.

    Raises:
      InputError: a given length is below the longest segment.
    """
    order = dataclasses.replace(order, seed=0)
    windows = [lengths[order.window(index)] for index in range(SHAPE_WINDOWS)]
    loads = np.array([window.reshape(-1, 2).sum(0) for window in windows]) / order.window_batches
    heaviest = np.unique(np.argsort(-loads, axis=0, kind="stable")[: TRIED_WINDOWS // 2])
    tried = [windows[index] for index in heaviest]
    load = loads.max(0)  # [2]: source and target tokens of a batch
    longest = lengths.reshape(-1, 2).max(0)
    given = [source_length, target_length]
    _check_given_lengths(given, longest)

    def lengthen(rows: int) -> RowShape:
        """The shape of at least so many rows that packs all that is tried."""
        while True:
            sides = [
                size or _round_up(need)
                for size, need in zip(given, load / rows * (1 + SPARED), strict=True)
            ]
            sides = [max(side, _round_up(need)) for side, need in zip(sides, longest, strict=True)]
            while not _packs(tried, RowShape(rows, *sides), order.window_batches):
                side = _tighter_side(load / rows, sides, given)
                if side is None:
                    break
                sides[side] += LENGTH_MULTIPLE
            else:
                shape = RowShape(rows, *sides)
                return _shrink(tried, shape, order.window_batches, given, longest)
            rows += 1

    return min((lengthen(rows) for rows in _row_counts(load, given, longest)), key=_cost)


def _row_counts(load: np.ndarray, given: list[int | None], longest: np.ndarray) -> list[int]:
    """The numbers of rows to begin with, each once."""
    if any(given):
        return [max(int(-(-need // size)) for need, size in zip(load, given, strict=True) if size)]
    most = min(load / longest / MIN_ROW_SEGMENTS)
    return sorted({max(1, round(min(load[0] / length, most))) for length in SOURCE_LENGTHS})


def _cost(shape: RowShape) -> float:
    """About what a step over such a batch costs, in source cells."""
    source, target = shape.source_length, shape.target_length
    attended = source * source + source * target + target * target
    return shape.rows * (source + TARGET_COST * target + attended / ATTENTION_LENGTH)


def _tighter_side(need: np.ndarray, sides: list[int], given: list[int | None]) -> int | None:
    """0 (source) or 1 (target), the fuller of the free sides; None if rows should be added."""
    fills = [0 if fixed else need[side] / sides[side] for side, fixed in enumerate(given)]
    return int(np.argmax(fills)) if max(fills) >= MIN_FILL else None


def _shrink(
    windows: list[np.ndarray],
    shape: RowShape,
    batches: int,
    given: list[int | None],
    longest: np.ndarray,
) -> RowShape:
    """Takes back what one side was given in vain while the other was too short."""
    for side, name in ((1, "target_length"), (0, "source_length")):
        shorter = dataclasses.replace(shape, **{name: getattr(shape, name) - LENGTH_MULTIPLE})
        is_free = given[side] is None and getattr(shorter, name) >= longest[side]
        if is_free and _packs(windows, shorter, batches):
            shape = shorter
    return shape


def _packs(windows: list[np.ndarray], shape: RowShape, batches: int) -> bool:
    """Whether all windows are packed without a rest, with a little to spare on each side."""
    longest = np.max([window.reshape(-1, 2).max(0) for window in windows], axis=0)
    sides = (shape.source_length, shape.target_length)
    spared = [
        max(side - 1 - int(side * SPARED), need) for side, need in zip(sides, longest, strict=True)
    ]
    shape = RowShape(shape.rows, *map(int, spared))
    most = np.max([window.reshape(-1, 2).sum(0) for window in windows], axis=0) / batches
    if (most > MAX_FILL * shape.rows * np.array(spared)).any():
        return False
    return all(not plan_window(window, shape, batches, (0,)).left_out.size for window in windows)


def _round_up(length: float) -> int:
    return int(-(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)


def _check_given_lengths(given: list[int | None], longest: np.ndarray) -> None:
    for side, size, need in zip(("source", "target"), given, longest, strict=True):
        if size is not None and size < need:
            limit = "max_input_length" if side == "source" else "max_target_length"
            raise InputError(
                f"{side}_length is {size}, but the longest {side} has {need} tokens; set "
                f"{side}_length to at least {need}, or {limit} to at most {size}"
            )
