"""The role losses against values computed by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dslt.core import losses
from dslt.core.batch import ROLE_LABEL, ROLE_NONE, ROLE_RATIONALE
from dslt.core.cross_entropy import linear_cross_entropy
from dslt.core.losses import RoleSums, objective_weights, role_weights

LABEL, RATIONALE = 0, 1  # the rows of RoleSums


@pytest.fixture(autouse=True)
def _rank_promotion_is_an_error():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def batch(build_batch):
    """A label of 2 tokens and a rationale of 3 in one row; a label of 1 token in another."""
    return build_batch(
        [
            [([5], [2, 1], ROLE_LABEL), ([6], [3, 2, 1], ROLE_RATIONALE)],
            [([7], [3], ROLE_LABEL)],
        ],
        source_length=4,
        target_length=6,
    )


def sum_by_role(logits, batch) -> RoleSums:
    """The sums of a batch whose logits are given: an output layer of ones on the diagonal."""
    arrays = logits, jnp.eye(logits.shape[-1]), batch.decoder_target_tokens
    _, nll, is_correct = linear_cross_entropy(*arrays, batch.decoder_loss_weights)
    return losses.sum_by_role(nll, is_correct, batch)


def objective(logits, batch, rationale_weight: float, tokens=None):
    """L_label + λ·L_rationale, over `tokens` or the batch's own."""
    tokens = role_weights(batch).sum((1, 2)) if tokens is None else jnp.asarray(tokens)
    weights = objective_weights(batch, tokens, rationale_weight)
    arrays = logits, jnp.eye(logits.shape[-1]), batch.decoder_target_tokens
    return linear_cross_entropy(*arrays, weights)[0]


@pytest.fixture
def logits():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 5)), jnp.float32)


def test_sums_by_hand():
    """Four token types; the logits are logarithms of whole numbers, so that shares are plain."""
    from dslt.core.batch import empty_batch

    batch = empty_batch(1, 1, 3)
    batch.decoder_target_tokens[:] = [[0, 3, 1]]
    batch.decoder_loss_roles[:] = [[ROLE_LABEL, ROLE_RATIONALE, ROLE_RATIONALE]]
    batch.decoder_loss_weights[:] = [[1.0, 1.0, 0.5]]
    shares = [[5, 1, 1, 1], [1, 1, 4, 2], [1, 7, 1, 1]]  # p = 5/8, 2/8, 7/10 of the targets
    logits = jnp.log(jnp.asarray([shares], jnp.float32))
    sums = sum_by_role(logits, batch)
    label_nll = math.log(8 / 5)
    rationale_nll = math.log(8 / 2) + 0.5 * math.log(10 / 7)
    np.testing.assert_allclose(sums.nll, [label_nll, rationale_nll], rtol=1e-6)
    np.testing.assert_allclose(sums.correct, [1.0, 0.5])  # the second token is missed
    np.testing.assert_allclose(sums.tokens, [1.0, 1.5])
    expected = label_nll + 0.3 * rationale_nll / 1.5
    np.testing.assert_allclose(objective(logits, batch, 0.3), expected, rtol=1e-6)


def test_each_weight_belongs_to_one_role(batch):
    batch.decoder_loss_weights[0, 2] = 0.25
    by_role = np.asarray(role_weights(batch))
    np.testing.assert_allclose(by_role.sum((1, 2)), [3.0, 2.25])
    np.testing.assert_array_equal(by_role[LABEL, 0], [1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(by_role[RATIONALE, 0], [0, 0, 0.25, 1, 1, 0])
    np.testing.assert_array_equal(by_role.sum(0), batch.decoder_loss_weights)


def test_logits_and_targets_of_padding_change_nothing(batch, logits):
    is_padding = batch.decoder_segment_ids == 0
    assert is_padding.sum() == 6
    expected = sum_by_role(logits, batch)
    shouted = jnp.where(is_padding[..., None], 100 * logits[..., ::-1], logits)
    targets = np.where(is_padding, 4, batch.decoder_target_tokens)
    sums = sum_by_role(shouted, batch._replace(decoder_target_tokens=targets))
    jax.tree.map(np.testing.assert_array_equal, sums, expected)


def test_a_weight_without_role_changes_nothing(batch, logits):
    expected = sum_by_role(logits, batch)
    weights = np.where(batch.decoder_loss_roles == ROLE_NONE, 9.0, batch.decoder_loss_weights)
    sums = sum_by_role(logits, batch._replace(decoder_loss_weights=weights.astype(np.float32)))
    jax.tree.map(np.testing.assert_array_equal, sums, expected)


def test_gradient_reaches_weighted_tokens_alone(batch, logits):
    batch.decoder_loss_weights[1, 0] = 0.0
    reached = jax.grad(objective)(logits, batch, 1.0)
    np.testing.assert_array_equal(np.abs(reached).sum(-1) > 0, batch.decoder_loss_weights > 0)


def test_rationale_logits_do_not_reach_the_label_loss(batch, logits):
    gradient = jax.grad(objective)(logits, batch, 0.0)
    is_label = batch.decoder_loss_roles == ROLE_LABEL
    np.testing.assert_array_equal(np.abs(gradient).sum(-1) > 0, is_label)


def test_sums_of_microbatches_add_up(batch, logits):
    whole = sum_by_role(logits, batch)
    parts = [
        sum_by_role(logits[i : i + 1], jax.tree.map(lambda x, i=i: x[i : i + 1], batch))
        for i in range(2)
    ]
    jax.tree.map(
        lambda a, b, c: np.testing.assert_allclose(a + b, c, rtol=1e-6), *parts, whole
    )  # the order of float32 additions differs


def test_the_objective_is_the_sum_of_two_means(batch, logits):
    sums = sum_by_role(logits, batch)
    means = sums.nll / sums.tokens
    np.testing.assert_allclose(objective(logits, batch, 0.7), means[0] + 0.7 * means[1], rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 0.2, 0.9])
def test_relation_to_the_authors_alpha(batch, logits, alpha):
    """α·L_label + (1−α)·L_rationale is α times the objective at λ = (1−α)/α."""
    sums = sum_by_role(logits, batch)
    label, rationale = sums.nll / sums.tokens
    theirs = alpha * label + (1 - alpha) * rationale
    ours = objective(logits, batch, (1 - alpha) / alpha)
    np.testing.assert_allclose(alpha * ours, theirs, rtol=1e-6)


def test_the_weight_is_no_token_share(batch):
    """A role's tokens share its weight, however many they are."""
    few = objective_weights(batch, jnp.asarray([2.0, 2.0]), 0.5)
    many = objective_weights(batch, jnp.asarray([2.0, 20.0]), 0.5)
    is_rationale = batch.decoder_loss_roles == ROLE_RATIONALE
    np.testing.assert_allclose(few[is_rationale], 0.5 / 2)
    np.testing.assert_allclose(many[is_rationale], 0.5 / 20)
    np.testing.assert_array_equal(few[~is_rationale], many[~is_rationale])


@pytest.mark.parametrize("role", [LABEL, RATIONALE])
def test_a_role_without_tokens_adds_nothing(batch, logits, role):
    weights = role_weights(batch)
    batch = batch._replace(decoder_loss_weights=np.asarray(weights[1 - role]))
    sums = sum_by_role(logits, batch)
    assert sums.tokens[role] == 0
    rate = (1.0, 2.0)[1 - role]
    expected = rate * sums.nll[1 - role] / sums.tokens[1 - role]
    value, gradient = jax.value_and_grad(objective)(logits, batch, 2.0)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_scaling_a_roles_weights_changes_nothing(batch, logits):
    """A mean has no scale, also where fractional weights sum to less than one token."""
    expected = objective(logits, batch, 1.0)
    tenth = batch._replace(decoder_loss_weights=batch.decoder_loss_weights / 10)
    np.testing.assert_allclose(objective(logits, tenth, 1.0), expected, rtol=1e-6)


def test_a_large_vocabulary_logit_does_not_overflow(batch, logits):
    sums = sum_by_role(logits.at[..., 0].set(1e4), batch)
    assert np.isfinite(sums.nll).all()
    np.testing.assert_allclose(sums.nll, [3e4, 3e4], rtol=1e-3)  # every target is 1e4 nats off
