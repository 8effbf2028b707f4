"""Items in bins: none is lost, loads are what lies there, and bins are filled to the brim."""

import numpy as np
import pytest

from dslt.data import bins


def filled_to_the_brim(num_bins: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Items that fill so many bins exactly, on both sides, if they are put there rightly."""
    rng = np.random.default_rng(seed)
    capacity = np.array([100, 60])
    cuts = [np.sort(rng.choice(np.arange(1, size), (num_bins, 7))) for size in capacity]
    sides = [
        np.diff(np.pad(cut, ((0, 0), (1, 1)), constant_values=((0, 0), (0, size))), axis=1)
        for cut, size in zip(cuts, capacity, strict=True)
    ]
    return rng.permutation(np.stack(sides, -1).reshape(-1, 2)), capacity


@pytest.mark.parametrize("num_bins", [1, 3, 8])
def test_loads_are_those_of_the_items(num_bins):
    sizes, capacity = filled_to_the_brim(num_bins, seed=0)
    where, loads = bins.assign(sizes, capacity, num_bins)
    assert where.shape == (len(sizes),) and set(where) <= set(range(num_bins))
    for index in range(num_bins):
        assert (sizes[where == index].sum(0) == loads[index]).all()


@pytest.mark.parametrize("seed", range(5))
def test_bins_with_a_hundredth_to_spare_are_packed(seed):
    sizes, capacity = filled_to_the_brim(6, seed)
    _, loads = bins.assign(sizes, capacity + 1, 6)
    assert (loads <= capacity + 1).all()


def test_the_search_goes_on_where_no_swap_helps(monkeypatch):
    """Without it some of these overflow; with it none does."""

    def overflows(seed: int) -> bool:
        sizes, capacity = filled_to_the_brim(6, seed)
        return bool((bins.assign(sizes, capacity + 1, 6)[1] > capacity + 1).any())

    assert not any(map(overflows, range(20)))
    monkeypatch.setattr(bins, "_search_on", lambda packed: (packed.where, packed.load))
    assert any(map(overflows, range(20)))
