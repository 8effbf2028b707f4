"""The step's invariances: packing, padding, roles, λ, accumulation, clipping, dropout keys.

Dropout is off unless a test is about it. Tolerances of 1e-5 are float32 sums in another order.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dslt.core import t5, train_step
from dslt.core.batch import ROLE_LABEL, ROLE_RATIONALE, pad_rows
from dslt.core.optimizer import OptimizerConfig, make_optimizer, settled
from dslt.core.train_step import GradientSettings
from dslt.errors import InputError

TINY = dict(
    vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=2, num_decoder_layers=2
)
ROWS, SOURCE_LENGTH, TARGET_LENGTH = 4, 14, 12
# A step compiles in 1 s instead of 6, and these programs run for milliseconds.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}

LABEL_0 = ([3, 6, 7, 1], [11, 12, 1], ROLE_LABEL)
RATIONALE_0 = ([4, 6, 7, 1], [13, 14, 15, 16, 11, 1], ROLE_RATIONALE)
LABEL_1 = ([3, 8, 9, 10, 6, 1], [17, 1], ROLE_LABEL)
RATIONALE_1 = ([4, 8, 9, 10, 6, 1], [18, 19, 1], ROLE_RATIONALE)

keep_gradient = settled(
    optax.GradientTransformation(
        init=lambda params: jax.tree.map(jnp.zeros_like, params),
        update=lambda grads, _, params: (jax.tree.map(jnp.zeros_like, params), grads),
    )
)


@functools.cache
def model(dropout_rate: float = 0.0, dtype: str = "float32"):
    graphdef, abstract = t5.abstract_params(
        t5.T5Config(**TINY, dropout_rate=dropout_rate, dtype=dtype)
    )
    rng = np.random.default_rng(0)
    return graphdef, jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0.0, 0.3, x.shape), x.dtype), abstract
    )


@functools.cache
def compiled_step(dropout_rate: float, accumulation_steps: int, clip_norm: float):
    """The step that keeps its gradient as optimizer state; λ and the seed are arguments."""

    def step(state, batch, rationale_weight, seed):
        return train_step.train_step(
            state,
            batch,
            graphdef=model(dropout_rate)[0],
            optimizer=keep_gradient,
            settings=GradientSettings(rationale_weight, seed, accumulation_steps),
            clip_norm=clip_norm,
        )

    return jax.jit(step, compiler_options=QUICK_COMPILE)


def run(batch, rationale_weight=1.0, accumulation=1, clip=0.0, dropout_rate=0.0, seed=0, step=0):
    """The objective's gradient (after clipping) and the step's metrics."""
    state = train_step.init_state(model()[1], keep_gradient)._replace(step=jnp.int32(step))
    state, metrics = compiled_step(dropout_rate, accumulation, clip)(
        state, batch, rationale_weight=rationale_weight, seed=seed
    )
    return state.opt_state, metrics


@pytest.fixture
def build(build_batch):
    """Rows of segments in the one shape that most tests share."""

    def build_rows(*rows):
        return pad_rows(build_batch(rows, SOURCE_LENGTH, TARGET_LENGTH), ROWS)

    return build_rows


@pytest.fixture
def paired(build):
    """Two examples, each with its label and its rationale in one row."""
    return build([LABEL_0, RATIONALE_0], [RATIONALE_1, LABEL_1])


def assert_close(left, right, rtol=1e-5):
    """Leaves agree within `rtol` of the largest entry anywhere in the trees."""
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(right))
    assert largest > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=rtol * largest), left, right)


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_packing_changes_nothing(build, paired):
    apart = run(build([LABEL_0], [RATIONALE_0], [LABEL_1], [RATIONALE_1]), 0.7)
    together = run(paired, 0.7)
    assert_close(together, apart)
    np.testing.assert_array_equal(together[1].sums.tokens, [5, 9])


def test_order_of_segments_changes_nothing(build, paired):
    assert_close(run(build([RATIONALE_0, LABEL_0], [LABEL_1, RATIONALE_1])), run(paired))


def test_padding_changes_nothing(build_batch, paired):
    rows = [[LABEL_0, RATIONALE_0], [RATIONALE_1, LABEL_1]]
    roomier = pad_rows(build_batch(rows, SOURCE_LENGTH + 5, TARGET_LENGTH + 3), 7)
    assert roomier.decoder_target_tokens.shape == (7, 15)
    assert_close(run(roomier), run(paired))


def test_tokens_in_padding_change_nothing(paired):
    noisy = paired._replace(
        encoder_input_tokens=np.where(paired.encoder_segment_ids, paired.encoder_input_tokens, 23),
        decoder_target_tokens=np.where(
            paired.decoder_segment_ids, paired.decoder_target_tokens, 29
        ),
    )
    assert_close(run(noisy), run(paired))


def test_rationales_do_not_leak_into_the_label_loss(paired):
    """With every rationale token another, the label's sums and its gradient are to the bit."""
    is_rationale = paired.decoder_loss_roles == ROLE_RATIONALE
    other = paired._replace(
        decoder_target_tokens=np.where(
            is_rationale, paired.decoder_target_tokens + 3, paired.decoder_target_tokens
        ).astype(np.int32)
    )
    (gradient, metrics), (other_gradient, other_metrics) = run(paired, 0.0), run(other, 0.0)
    assert_same(other_gradient, gradient)
    for sums, other_sums in zip(metrics.sums, other_metrics.sums, strict=True):
        assert other_sums[0] == sums[0]
    assert abs(other_metrics.sums.nll[1] - metrics.sums.nll[1]) > 0.1


def test_objective_is_linear_in_the_roles(build, paired):
    """L = L_label + λ·L_rationale, each from a batch of its own."""
    label_gradient, label = run(build([LABEL_0], [LABEL_1]))
    rationale_gradient, rationale = run(build([RATIONALE_0], [RATIONALE_1]))
    gradient, both = run(paired, 0.3)
    np.testing.assert_allclose(both.loss, label.loss + 0.3 * rationale.loss, rtol=1e-5)
    np.testing.assert_allclose(label.loss, label.sums.nll[0] / 5, rtol=1e-6)
    np.testing.assert_allclose(rationale.loss, rationale.sums.nll[1] / 9, rtol=1e-6)
    expected = jax.tree.map(lambda a, b: a + 0.3 * b, label_gradient, rationale_gradient)
    assert_close(gradient, expected)


def test_a_rationale_weight_of_zero_is_fine_tuning(build, paired):
    gradient, metrics = run(paired, 0.0)
    expected_gradient, expected = run(build([LABEL_0], [LABEL_1]), 1.0)
    assert_close(gradient, expected_gradient)
    assert_close((metrics.loss, metrics.grad_norm), (expected.loss, expected.grad_norm))


def test_weight_zero_is_absence(build):
    without = run(build([LABEL_0, RATIONALE_0], [LABEL_1]))
    rejected = run(build([LABEL_0, RATIONALE_0], [LABEL_1, (*RATIONALE_1, 0.0)]))
    assert_close(rejected, without)


def test_a_weight_scales_a_token_within_its_role(build):
    """Twice the weight is the example twice."""
    twice = run(build([LABEL_0], [LABEL_1], [LABEL_1], [RATIONALE_0]))
    weighted = run(build([LABEL_0], [(*LABEL_1, 2.0)], [RATIONALE_0]))
    assert_close((weighted[0], weighted[1].loss), (twice[0], twice[1].loss))


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulated_equals_whole_batch(build, accumulation):
    """Microbatches of unequal numbers of label tokens: 3, 0, 2 and 5, and one has no rationale."""
    batch = build([LABEL_0], [RATIONALE_0], [LABEL_1, RATIONALE_1], [LABEL_0, LABEL_1])
    whole = run(batch, 0.4)
    assert_close(run(batch, 0.4, accumulation), whole)
    np.testing.assert_array_equal(whole[1].sums.tokens, [10, 9])


def test_rows_that_cannot_be_dealt_out_are_refused(paired):
    with pytest.raises(ValueError, match="4 rows cannot be dealt to 3 microbatches"):
        run(paired, accumulation=3)


@pytest.mark.parametrize(
    ("segments", "absent"), [([LABEL_0, LABEL_1], 1), ([RATIONALE_0, RATIONALE_1], 0), ([], 0)]
)
def test_an_empty_role_adds_zero_not_nan(build, segments, absent):
    gradient, metrics = run(build(segments))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradient, metrics)))
    assert metrics.sums.tokens[absent] == metrics.sums.nll[absent] == 0
    assert (metrics.loss > 0) == bool(segments)
    assert (metrics.grad_norm > 0) == bool(segments)


def test_clipping_by_hand(paired):
    gradient, metrics = run(paired)
    norm = np.sqrt(sum(np.square(np.float64(leaf)).sum() for leaf in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
    assert norm > 0.5
    clipped, clipped_metrics = run(paired, clip=0.5)
    assert_close(clipped, jax.tree.map(lambda leaf: leaf * (0.5 / norm), gradient))
    assert clipped_metrics.grad_norm == metrics.grad_norm  # logged before clipping


def test_a_gradient_below_the_norm_is_not_clipped(build):
    batch = build([RATIONALE_0], [RATIONALE_1])
    gradient, metrics = run(batch, 0.01)
    assert 0 < metrics.grad_norm < 0.5
    assert_close(run(batch, 0.01, clip=0.5)[0], gradient, rtol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_dropout_is_a_function_of_seed_and_step(paired, accumulation):
    drop = functools.partial(run, paired, dropout_rate=0.3, accumulation=accumulation)
    first = drop(seed=1, step=5)
    assert_same(drop(seed=1, step=5), first)
    for other in (drop(seed=1, step=6), drop(seed=2, step=5), run(paired)):
        assert abs(other[1].loss - first[1].loss) > 1e-3


def test_another_kind_of_keys_in_the_environment_changes_nothing(paired):
    """JAX_DEFAULT_PRNG_IMPL, which recipes for TPUs set."""
    config = t5.T5Config(**TINY)
    expected = jax.tree.map(np.asarray, t5.init_params(config, seed=3)[1])
    _, metrics = run(paired, dropout_rate=0.3, seed=3)
    with jax.default_prng_impl("rbg"):
        params = t5.init_params(config, seed=3)[1]
        compiled_step.cache_clear()
        _, found = run(paired, dropout_rate=0.3, seed=3)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    jax.tree.map(np.testing.assert_array_equal, found, metrics)


def test_microbatches_draw_different_dropout(build):
    """Four copies of a row, dealt to four microbatches, do not all lose the same units."""
    copies = build([LABEL_0], [LABEL_0], [LABEL_0], [LABEL_0])
    only_first = copies._replace(decoder_loss_weights=copies.decoder_loss_weights.copy())
    only_first.decoder_loss_weights[1:] = 0
    drop = functools.partial(run, accumulation=4, dropout_rate=0.3)
    total, first = drop(copies)[1].sums.nll[0], drop(only_first)[1].sums.nll[0]
    assert abs(total - 4 * first) > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_memorises_with_a_donated_state(paired, dtype):
    config = OptimizerConfig(learning_rate=0.02, schedule="constant", weight_decay=0.01)
    optimizer = make_optimizer(config, num_steps=60)
    graphdef, params = model(dtype=dtype)
    step = jax.jit(
        functools.partial(
            train_step.train_step,
            graphdef=graphdef,
            optimizer=optimizer,
            settings=GradientSettings(rationale_weight=0.5),
            clip_norm=1.0,
        ),
        donate_argnums=0,
        compiler_options=QUICK_COMPILE,
    )
    state = train_step.init_state(jax.tree.map(jnp.copy, params), optimizer)
    first = state
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a buffer that cannot be donated is a warning
        for _ in range(60):
            state, metrics = step(state, paired)
            losses.append(float(metrics.loss))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    assert state.step == 60 and state.step.dtype == jnp.int32
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert losses[0] > 3 and losses[-1] < 0.05
    np.testing.assert_array_equal(metrics.sums.correct, metrics.sums.tokens)  # every token learnt


@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_the_consistency_term_is_added_with_its_weight_and_moves_the_gradient(build, weight):
    """In one batch with both tasks' segments of two examples, in rows of their own."""
    batch = build([LABEL_0, RATIONALE_1], [LABEL_1, RATIONALE_0])
    targets = {tuple(segment[1]): number for number, segment in enumerate((LABEL_0, LABEL_1), 1)}
    targets |= {tuple(s[1]): n for n, s in enumerate((RATIONALE_0, RATIONALE_1), 1)}
    for row, ids in enumerate(batch.decoder_segment_ids):
        for segment in range(1, ids.max() + 1):
            tokens = tuple(batch.decoder_target_tokens[row][ids == segment].tolist())
            batch.decoder_example_ids[row][ids == segment] = targets[tokens]

    def gradient(consistency_weight):
        step = functools.partial(
            train_step.train_step,
            graphdef=model()[0],
            optimizer=keep_gradient,
            settings=GradientSettings(consistency_weight=consistency_weight),
            clip_norm=0.0,
        )
        state = train_step.init_state(model()[1], keep_gradient)
        state, metrics = jax.jit(step, compiler_options=QUICK_COMPILE)(state, batch)
        return state.opt_state, metrics

    plain, without = gradient(0.0)
    drawn, metrics = gradient(weight)
    assert without.consistency == 0 and 0 < metrics.consistency < 20
    np.testing.assert_allclose(metrics.loss, without.loss + weight * metrics.consistency, rtol=1e-5)
    moved = [
        np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (plain, drawn)), strict=True)
    ]
    assert max(moved) > 1e-3


def test_the_consistency_term_wants_the_whole_batch_at_once(build):
    with pytest.raises(InputError, match="an example's label and rationale may lie in two of them"):
        train_step.gradient_of(
            model()[1],
            build([LABEL_0]),
            jnp.int32(0),
            graphdef=model()[0],
            settings=GradientSettings(accumulation_steps=2, consistency_weight=1.0),
            mesh=None,
        )


@functools.cache
def settling_step(on_nonfinite: str, accumulation_steps: int, rationale_weight: float = 0.5):
    """An AdamW step whose learning rate falls at each."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1), num_steps=10)
    step = functools.partial(
        train_step.train_step,
        graphdef=model()[0],
        optimizer=optimizer,
        settings=GradientSettings(rationale_weight, accumulation_steps=accumulation_steps),
        clip_norm=1.0,
        on_nonfinite=on_nonfinite,
    )
    start = train_step.init_state(model()[1], optimizer)
    return jax.jit(step, compiler_options=QUICK_COMPILE), start


def counters(state):
    return [int(x) for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.integer)]


def reals(state):
    return [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("number", [np.inf, np.nan])
def test_a_step_that_is_not_finite_is_skipped(paired, accumulation, number):
    """Parameters and moments stay, counters go on, and the step after is as from that state."""
    step, start = settling_step("skip", accumulation)
    weights = paired.decoder_loss_weights.copy()
    weights[0, 0] = number  # of one token in one of the microbatches
    bad = paired._replace(decoder_loss_weights=weights)
    first, metrics = step(start, paired)
    assert metrics.is_finite and counters(first) == [1] * len(counters(first))
    skipped, metrics = step(first, bad)
    assert not metrics.is_finite
    assert counters(skipped) == [2] * len(counters(first))
    assert_same(reals(skipped), reals(first))
    after, metrics = step(skipped, paired)
    assert metrics.is_finite
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    assert max(np.abs(a - b).max() for a, b in zip(reals(after), reals(first), strict=True)) > 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_that_is_not_finite_halts_the_state(paired, accumulation):
    """Whatever comes behind it, until the host looks: then it goes on as if nothing had been."""
    step, start = settling_step("stop", accumulation)
    bad = paired._replace(decoder_loss_weights=paired.decoder_loss_weights * np.float32(np.nan))
    first, _ = step(start, paired)
    halted, metrics = step(first, bad)
    assert not metrics.is_finite and halted.step == -2
    for batch in (paired, bad, paired):
        halted, _ = step(halted, batch)
    assert halted.step == -2
    assert_same(train_step.resumable(halted), first)
    assert_same(train_step.resumable(first), first)
    assert_same(step(train_step.resumable(halted), paired), step(first, paired))


def test_a_finite_gradient_whose_norm_is_not_is_skipped_too(paired):
    """Clipping would make zeros of it: 1 / inf."""
    step, start = settling_step("skip", 1, rationale_weight=1e30)
    after, metrics = step(start, paired)
    assert np.isfinite(metrics.loss) and not metrics.is_finite
    assert_same(reals(after), reals(start))
