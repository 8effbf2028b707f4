"""The choice of a token: ties, the distribution that is drawn from, its support, answer sets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dslt.core.batch import EOS_ID, PAD_ID
from dslt.core.choose import choose_answer_token, most_likely, sample
from dslt.core.decode import DecodeConfig

DRAWS = 20_000
CHI_SQUARE_999 = {2: 13.8, 3: 16.3, 5: 20.5, 6: 22.5}  # by degrees of freedom: 1 in 1,000 is above
PROBABILITIES = np.array([0.4, 0.02, 0.25, 0.03, 0.2, 0.1])
LOGITS = np.log(PROBABILITIES).astype(np.float32) + 7.0


@functools.partial(jax.jit, static_argnames="config")
def draw(logits, config, numbers, positions):
    return sample(logits, config, numbers, positions)


def draw_many(config: DecodeConfig, logits: np.ndarray = LOGITS) -> np.ndarray:
    """[DRAWS] tokens from the same logits: a thousand rows at twenty positions each."""
    numbers = np.arange(DRAWS, dtype=np.int32) // 20
    positions = np.arange(DRAWS, dtype=np.int32) % 20
    return np.asarray(draw(np.tile(logits, (DRAWS, 1)), config, numbers, positions))


def sampling(**fields) -> DecodeConfig:
    return DecodeConfig(strategy="sample", **fields)


def assert_drawn_from(expected: np.ndarray, drawn: np.ndarray) -> None:
    """Pearson's chi-square test; tokens of probability 0 were never drawn."""
    counts = np.bincount(drawn, minlength=len(expected))
    is_possible = expected > 0
    assert not counts[~is_possible].any()
    means = DRAWS * expected[is_possible]
    chi_square = (np.square(counts[is_possible] - means) / means).sum()
    assert chi_square < CHI_SQUARE_999[is_possible.sum() - 1]


def test_the_first_of_the_most_likely_is_taken():
    logits = jnp.array([[1.0, 3.0, 2.0, 3.0], [-jnp.inf, -5.0, -9.0, -jnp.inf], [0.0] * 4])
    found = most_likely(logits)
    np.testing.assert_array_equal(found, [1, 1, 0])
    assert found.dtype == jnp.int32


def test_samples_follow_the_softmax():
    assert_drawn_from(PROBABILITIES, draw_many(sampling()))


def test_temperature_divides_the_logits():
    expected = PROBABILITIES ** (1 / 0.5)
    assert_drawn_from(expected / expected.sum(), draw_many(sampling(temperature=0.5)))


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"top_k": 3}, [0, 2, 4]),
        ({"top_k": 99}, [0, 1, 2, 3, 4, 5]),
        ({"top_p": 0.86}, [0, 2, 4, 5]),  # 0.4 + 0.25 + 0.2 are not enough
        ({"top_p": 0.84}, [0, 2, 4]),
        ({"top_k": 4, "top_p": 0.88}, [0, 2, 4]),  # of 0.95 that are left, 0.85 are 0.89
    ],
    ids=str,
)
def test_top_k_and_top_p_leave_the_others_in_proportion(fields, kept):
    expected = np.zeros_like(PROBABILITIES)
    expected[kept] = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
    assert_drawn_from(expected, draw_many(sampling(**fields)))


def test_top_k_keeps_equals_together():
    logits = np.array([0.0, 2.0, 1.0, 1.0, 0.0, 0.0], np.float32)
    assert set(draw_many(sampling(top_k=2), logits)) == {1, 2, 3}


@pytest.mark.parametrize(
    "fields",
    [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-3}, {"temperature": 1e-30}],
    ids=str,
)
def test_a_narrow_choice_is_the_greedy_one(fields):
    logits = np.random.default_rng(0).normal(0, 50, (64, 1000)).astype(np.float32)
    rows = np.arange(64, dtype=np.int32)
    found = draw(logits, sampling(**fields), rows, rows)
    np.testing.assert_array_equal(found, logits.argmax(-1))


def test_noise_depends_on_seed_number_and_position_alone():
    logits = np.tile(np.zeros(997, np.float32), (4, 1))  # two draws are equal once in 997
    numbers, positions = np.array([5, 5, 6, 7], np.int32), np.array([0, 1, 0, 9], np.int32)
    found = np.asarray(draw(logits, sampling(seed=3), numbers, positions))
    assert len(set(found)) == 4
    order = np.array([2, 3, 0])
    moved = draw(logits[:3], sampling(seed=3), numbers[order], positions[order])
    np.testing.assert_array_equal(moved, found[order])
    assert (np.asarray(draw(logits, sampling(seed=4), numbers, positions)) != found).any()


def test_only_tokens_towards_an_answer_are_taken():
    """Answers that begin alike, one of which is the beginning of another; by hand."""
    paths = [[5, EOS_ID], [5, 6, EOS_ID], [5, 6, 7, EOS_ID], [8, EOS_ID]]
    answers = np.full((5, 4), PAD_ID, np.int32)  # the last is none
    for row, path in zip(answers, paths, strict=False):
        row[: len(path)] = path
    begun = [[], [5], [5, 6], [5, 6, 7], [8]]
    allowed = [{5, 8}, {EOS_ID, 6}, {EOS_ID, 7}, {EOS_ID}, {EOS_ID}]
    tokens = np.full((len(begun), 6), PAD_ID, np.int32)
    for row, path in zip(tokens, begun, strict=True):
        row[: len(path)] = path
    lengths = np.array([len(path) for path in begun], np.int32)
    choose = jax.jit(choose_answer_token)
    for seed in range(8):
        logits = np.random.default_rng(seed).normal(size=(len(begun), 9)).astype(np.float32)
        found = choose(logits, np.tile(answers, (len(begun), 1, 1)), tokens, lengths)
        best = [
            max(options, key=row.__getitem__) for options, row in zip(allowed, logits, strict=True)
        ]
        np.testing.assert_array_equal(found, best)
