"""Items of two sizes, source and target, into bins that hold both: for packing. Numpy alone.

bin_of_item, loads = assign(sizes, capacity=np.array([408, 216]), bins=3)
"""

import numpy as np

SWAPS_ASIDE = 128  # of them, items of the bin that overflows
MAX_SWAPS = 1 << 14  # candidates looked at for one swap; all of them where bins are small
TABU_STEPS = 200  # swaps once none helps: what is possible is found in tens of them
TABU_REST = 6  # swaps for which a swapped item is not swapped again


def assign(sizes: np.ndarray, capacity: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Gives each item a bin so that no bin overflows, if that can be found.

    Args:
      sizes: [n, 2] integers, source and target tokens.
      capacity: [2], of every bin.

    Returns:
      ([n] bin of each item, [bins, 2] load of each bin).
    """
    relative = sizes / capacity
    order = np.argsort(-relative.max(1, initial=0), kind="stable")
    source_load, target_load = np.zeros((2, bins))
    where = np.zeros(len(sizes), np.int64)
    # Side by side and by plain floats: two axes at once would take twice as long.
    for item, (source, target) in zip(order.tolist(), relative[order].tolist(), strict=True):
        chosen = np.maximum(source_load + source, target_load + target).argmin()
        where[item] = chosen
        source_load[chosen] += source
        target_load[chosen] += target
    return _swap_until_it_fits(sizes, capacity, bins, where)


class _Bins:
    """Items in bins, of which some overflow. Where every bin holds an empty item, a swap can move.

    Attributes:
      where: [items] the bin of each item.
      load: [bins, 2] source and target tokens.
      excess: [bins] how far each overflows, as `_excess` counts it.
    """

    def __init__(self, sizes: np.ndarray, capacity: np.ndarray, bins: int, where: np.ndarray):
        self.sizes, self.capacity, self.where = sizes, capacity, where
        self.load = np.zeros((bins, 2), np.int64)
        np.add.at(self.load, where, sizes)
        self.excess = _excess(self.load, capacity)

    def best_swap(self, worst: int, is_free: np.ndarray | None = None) -> tuple[float, int, int]:
        """By how much the best swap lessens what overflows, an item of bin `worst`, another's.

        Args:
          is_free: [items] bool, which of them may be swapped; all by default.
        """
        is_mine = self.where == worst
        is_other = ~is_mine
        if is_free is not None:
            is_mine, is_other = is_mine & is_free, is_other & is_free
        mine, others = np.flatnonzero(is_mine), np.flatnonzero(is_other)
        if not (len(mine) and len(others)):
            return -np.inf, 0, 0
        others = others[:: 1 + len(others) * min(len(mine), SWAPS_ASIDE) // MAX_SWAPS]
        mine = mine[:: 1 + len(mine) // SWAPS_ASIDE]
        change = self.sizes[others] - self.sizes[mine, None]  # [mine, others, 2]: worst's gain
        after = _excess(self.load[worst] + change, self.capacity)
        after += _excess(self.load[self.where[others]] - change, self.capacity)
        gain = self.excess[worst] + self.excess[self.where[others]] - after
        gain[~change.any(-1)] = -np.inf
        i, j = np.unravel_index(gain.argmax(), gain.shape)
        return float(gain[i, j]), int(mine[i]), int(others[j])

    def swap(self, one: int, other: int) -> None:
        bins = self.where[[one, other]]
        change = self.sizes[other] - self.sizes[one]
        self.load[bins] += change, -change
        self.excess[bins] = _excess(self.load[bins], self.capacity)
        self.where[[one, other]] = bins[::-1]


def _swap_until_it_fits(
    sizes: np.ndarray, capacity: np.ndarray, bins: int, where: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Swaps or moves items, the best swap first, while that lessens what overflows."""
    items = len(sizes)
    sizes = np.concatenate([sizes, np.zeros((bins, 2), sizes.dtype)])  # a swap with these: a move
    packed = _Bins(sizes, capacity, bins, np.concatenate([where, np.arange(bins)]))
    is_stuck = np.zeros(bins, bool)
    while (over := np.where(is_stuck, 0, packed.excess)).any():
        worst = int(over.argmax())
        gain, one, other = packed.best_swap(worst)
        if gain < 1e-9:
            is_stuck[worst] = True
            continue
        packed.swap(one, other)
        is_stuck[:] = False
    where, load = _search_on(packed) if packed.excess.any() else (packed.where, packed.load)
    return where[:items], load


def _search_on(packed: _Bins) -> tuple[np.ndarray, np.ndarray]:
    """Tabu search from where no swap helps: the best one even so, and its items rest for a while.

    Returns:
      ([items] bin of each, [bins, 2] loads) where least overflowed.
    """
    least, where, load = packed.excess.sum(), packed.where.copy(), packed.load.copy()
    rests_until = np.zeros(len(where), np.int64)
    for step in range(1, TABU_STEPS + 1):
        gain, one, other = packed.best_swap(int(packed.excess.argmax()), rests_until < step)
        if gain == -np.inf:
            continue
        packed.swap(one, other)
        rests_until[[one, other]] = step + TABU_REST
        if (now := packed.excess.sum()) < least:
            least, where, load = now, packed.where.copy(), packed.load.copy()
        if not least:
            break
    return where, load


def _excess(load: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """How far loads [..., 2] exceed the capacity, in shares of it, both sides together: [...]."""
    over = np.maximum(load - capacity, 0) / capacity
    return over[..., 0] + over[..., 1]
