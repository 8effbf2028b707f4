"""The masks look random in every way that matters here, and nothing is kept to draw them again."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dslt.core.dropout import dropout, is_kept

SIZE = 2**20
# Of a standard normal statistic; the largest of 168 is near 3.
MANY_SIGMAS = 4.5
LAGS = (1, 2, 3, 4, 7, 8, 16, 64, 128, 512, 768, 1024, 2048, 4096)


def mask(key: int, rate: float, start: int = 0) -> np.ndarray:
    """[SIZE] of mean 0 and variance 1 where entries are kept independently."""
    index = jnp.arange(SIZE, dtype=jnp.uint32) + jnp.uint32(start)
    kept = is_kept(index, rate, *jax.random.key_data(jax.random.key(key)))
    return (np.asarray(kept) - (1 - rate)) / np.sqrt(rate * (1 - rate))


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("start", [0, 2**32 - SIZE // 2], ids=["from_zero", "around_the_end"])
def test_entries_are_kept_independently(rate, start):
    x = mask(1, rate, start)
    statistics = {"mean": x.sum() / np.sqrt(SIZE)}
    for lag in LAGS:
        statistics[f"pairs {lag} apart"] = x[lag:] @ x[:-lag] / np.sqrt(SIZE - lag)
        triples = x[2 * lag :] * x[lag:-lag] * x[: -2 * lag]
        statistics[f"triples {lag} apart"] = triples.sum() / np.sqrt(len(triples))
    for width in (64, 512, 1024):  # rows and columns are no more even, nor less, than chance
        table = x.reshape(-1, width)
        for axis, name in enumerate(("columns", "rows")):
            sums = table.sum(axis) / np.sqrt(table.shape[axis])
            statistics[f"{name} of {width}"] = (sums.var() - 1) * np.sqrt(len(sums) / 2)
    assert {name: value for name, value in statistics.items() if abs(value) > MANY_SIGMAS} == {}


def test_keys_draw_independently():
    """Those of a step's layers are split from one."""
    keys = jax.random.split(jax.random.key(3), 8)
    index = jnp.arange(SIZE, dtype=jnp.uint32)
    masks = [np.asarray(is_kept(index, 0.5, *jax.random.key_data(key))) * 2.0 - 1 for key in keys]
    for one, other in itertools.combinations(masks, 2):
        assert abs(one @ other) < MANY_SIGMAS * np.sqrt(SIZE)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_has_the_same_mask_and_nothing_is_kept_for_it(dtype):
    x = jnp.ones((4, 64, 32), dtype)
    drop = lambda x: dropout(x, 0.25, jax.random.key(0))  # noqa: E731
    out, pull_back = jax.vjp(drop, x)
    np.testing.assert_array_equal(pull_back(x)[0], out)
    assert set(np.unique(out.astype(np.float32))) == {0.0, np.float32(dtype(4 / 3))}
    assert all(leaf.size < x.shape[0] for leaf in jax.tree.leaves(pull_back))
