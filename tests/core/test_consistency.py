"""The consistency term against its formula, and what may not change it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dslt.core.batch import ROLE_LABEL, ROLE_RATIONALE, empty_batch
from dslt.core.consistency import consistency_loss

TEMPERATURE = 0.5


def make_batch(segments, rows=2, length=12):
    """segments: (row, start, tokens, role, example)."""
    batch = empty_batch(rows, 4, length)
    for row, start, tokens, role, example in segments:
        place = np.s_[row, start : start + tokens]
        batch.decoder_loss_roles[place] = role
        batch.decoder_example_ids[place] = example
        batch.decoder_loss_weights[place] = 1.0
    return batch


PAIRS = [
    (0, 0, 2, ROLE_LABEL, 1),
    (0, 2, 3, ROLE_RATIONALE, 2),
    (0, 5, 1, ROLE_LABEL, 2),
    (1, 0, 4, ROLE_RATIONALE, 1),  # in another row than its label
    (1, 4, 2, ROLE_LABEL, 3),
    (1, 6, 5, ROLE_RATIONALE, 3),
]


@pytest.fixture
def hidden():
    return np.random.default_rng(0).normal(size=(2, 12, 6)).astype(np.float32)


def expected_loss(hidden, segments):
    """By loops, in float64."""
    views = {}
    for row, start, tokens, role, example in segments:
        views.setdefault((role, example), []).append(hidden[row, start : start + tokens])
    unit = {
        key: (total := np.concatenate(parts).astype(np.float64).sum(0)) / np.linalg.norm(total)
        for key, parts in views.items()
    }
    examples = sorted(e for role, e in unit if role == ROLE_LABEL and (ROLE_RATIONALE, e) in unit)
    cosines = np.array(
        [[unit[ROLE_LABEL, i] @ unit[ROLE_RATIONALE, j] for j in examples] for i in examples]
    )
    scores = cosines / TEMPERATURE
    both = [np.diag(s) - np.log(np.exp(s).sum(1)) for s in (scores, scores.T)]
    return -np.mean(both)


def loss_of(hidden, segments, max_examples=8):
    return float(consistency_loss(hidden, make_batch(segments), max_examples, TEMPERATURE))


def test_the_loss_is_its_formula(hidden):
    np.testing.assert_allclose(loss_of(hidden, PAIRS), expected_loss(hidden, PAIRS), rtol=1e-5)


def test_an_example_without_a_rationale_and_padding_add_nothing(hidden):
    more = [*PAIRS, (0, 8, 3, ROLE_LABEL, 4)]
    assert loss_of(hidden, more) == pytest.approx(loss_of(hidden, PAIRS), rel=1e-6)
    changed = hidden.copy()
    changed[0, 11] = 1e3
    assert loss_of(changed, more) == loss_of(hidden, more)


def test_two_rationales_of_an_example_are_one_view(hidden):
    more = [*PAIRS, (0, 8, 3, ROLE_RATIONALE, 3)]
    np.testing.assert_allclose(loss_of(hidden, more), expected_loss(hidden, more), rtol=1e-5)


def test_it_is_small_where_views_agree_and_log_n_where_they_say_nothing():
    hidden = np.zeros((2, 12, 6), np.float32)
    for row, start, tokens, _, example in PAIRS:
        hidden[row, start : start + tokens, example] = 1.0
    batch = make_batch(PAIRS)
    assert float(consistency_loss(hidden, batch, 8, 0.01)) == pytest.approx(0.0, abs=1e-6)
    same = np.ones((2, 12, 6), np.float32)
    assert float(consistency_loss(same, batch, 8, 0.01)) == pytest.approx(np.log(3), rel=1e-5)


@pytest.mark.parametrize("segments", [[], [(0, 0, 2, ROLE_LABEL, 1)]])
def test_without_pairs_it_is_zero_and_so_is_its_gradient(hidden, segments):
    batch = make_batch(segments)
    value, gradient = jax.value_and_grad(consistency_loss)(hidden, batch, 8, TEMPERATURE)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_its_gradient_is_finite_and_reaches_both_targets(hidden):
    gradient = jax.grad(consistency_loss)(jnp.asarray(hidden), make_batch(PAIRS), 8, TEMPERATURE)
    reached = np.abs(gradient).sum(-1) > 0
    np.testing.assert_array_equal(reached, make_batch(PAIRS).decoder_loss_roles > 0)
    assert np.isfinite(gradient).all()


def test_examples_beyond_the_number_are_left_out(hidden):
    assert loss_of(hidden, PAIRS, max_examples=2) == pytest.approx(
        expected_loss(hidden, [segment for segment in PAIRS if segment[-1] <= 2]), rel=1e-5
    )
