"""Schedules at chosen steps, and what each optimizer does to a T5's parameters."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dslt.core import t5
from dslt.core.optimizer import OptimizerConfig, make_optimizer, make_schedule


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [  # a run of 100 steps with peak 0.8
        ("constant", 0, {0: 0.8, 50: 0.8, 100: 0.8}),
        ("constant", 10, {0: 0.0, 5: 0.4, 10: 0.8, 99: 0.8}),
        ("linear", 0, {0: 0.8, 25: 0.6, 50: 0.4, 99: 0.008, 100: 0.0, 120: 0.0}),
        ("linear", 20, {0: 0.0, 10: 0.4, 20: 0.8, 60: 0.4, 100: 0.0}),
        ("cosine", 0, {0: 0.8, 25: 0.4 * (1 + math.sqrt(0.5)), 50: 0.4, 100: 0.0}),
        ("cosine", 20, {10: 0.4, 20: 0.8, 60: 0.4, 100: 0.0}),
        ("rsqrt", 0, {0: 0.8, 3: 0.4, 99: 0.08}),
        ("rsqrt", 25, {5: 0.16, 25: 0.8, 100: 0.4}),
        ("linear", 200, {100: 0.4}),  # a warm-up longer than the run
    ],
)
def test_schedule(schedule, warmup, expected):
    config = OptimizerConfig(learning_rate=0.8, schedule=schedule, warmup_steps=warmup)
    rate = make_schedule(config, num_steps=100)
    for step, value in expected.items():
        # float32 rates near zero carry the rounding of the peak
        np.testing.assert_allclose(rate(step), value, rtol=1e-5, atol=1e-7, err_msg=f"step {step}")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "adam"),
        ("schedule", "Linear"),
        ("learning_rate", 0.0),
        ("learning_rate", -1e-3),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
        ("clip_norm", -1.0),
    ],
)
def test_a_setting_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=rf"OptimizerConfig\.{field} is .*expected"):
        OptimizerConfig(**{field: value})


def tiny_params():
    shape = dict(vocab_size=24, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=2)
    _, params = t5.abstract_params(t5.T5Config(**shape, num_decoder_layers=3))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)


def flat(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_weight_decay_reaches_matrices_alone(name):
    """With a gradient of zero, decay is all that moves: by learning rate × decay."""
    params = tiny_params()
    config = OptimizerConfig(
        name=name, learning_rate=0.5, schedule="linear", warmup_steps=1, weight_decay=0.1
    )
    optimizer = make_optimizer(config, num_steps=3)
    state = optimizer.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    update_fn = jax.jit(optimizer.update)
    for rate in (0.0, 0.5, 0.25):  # the schedule's, which decay must follow
        updates, state = update_fn(zeros, state, params)
        for key, update in flat(updates).items():
            decay = 0.0 if key.endswith("scale") else rate * 0.1
            np.testing.assert_allclose(
                update, -decay * flat(params)[key], rtol=1e-5, atol=1e-9, err_msg=key
            )
    assert sum(key.endswith("scale") for key in flat(params)) == 7  # both per-layer and final


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_no_weight_decay_by_default(name):
    params = tiny_params()
    optimizer = make_optimizer(OptimizerConfig(name=name, learning_rate=0.5), num_steps=2)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = update_once(optimizer, zeros, params)
    assert not any(np.any(update) for update in flat(updates).values())


def test_adamw_first_steps_by_hand():
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", beta1=0.5, beta2=0.75)
    optimizer = make_optimizer(config, num_steps=10)
    params = {"wo": jnp.zeros(1)}
    state = optimizer.init(params)
    update, state = optimizer.update({"wo": jnp.asarray([4.0])}, state, params)
    np.testing.assert_allclose(update["wo"], -0.1, rtol=1e-5)
    update, state = optimizer.update({"wo": jnp.asarray([0.0])}, state, params)
    # m = 0.5·2 = 1 over 1 − 0.25; v = 0.75·4 = 3 over 1 − 0.5625
    expected = -0.1 * (1.0 / 0.75) / math.sqrt(3.0 / 0.4375)
    np.testing.assert_allclose(update["wo"], expected, rtol=1e-5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_optax_adamw(weight_decay):
    """Update by update; and its state, so that optax's checkpoints stay readable."""
    params = tiny_params()
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=2, weight_decay=weight_decay)
    ours = make_optimizer(config, num_steps=5)
    theirs = optax.adamw(
        make_schedule(config, num_steps=5),
        weight_decay=weight_decay,
        mask=lambda params: jax.tree.map_with_path(lambda path, _: path[-1].key != "scale", params),
    )
    state, their_state = ours.init(params), theirs.init(params)
    assert jax.tree.structure(state[0]) == jax.tree.structure(their_state[0])
    grads = params
    for _ in range(4):
        grads = jax.tree.map(lambda x: jnp.sin(2 * x), grads)
        updates, state = jax.jit(ours.update)(grads, state, params)
        expected, their_state = jax.jit(theirs.update)(grads, their_state, params)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-5, 1e-8), updates, expected)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-6), state[0], their_state[0])


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_an_update_that_is_not_taken_leaves_the_moments(name):
    """They stay the same bits, whatever the gradient was; the counters go on."""
    params = tiny_params()
    optimizer = make_optimizer(OptimizerConfig(name=name, weight_decay=0.1), num_steps=5)
    take = jax.jit(optimizer.update)
    _, state = take(jax.tree.map(jnp.sin, params), optimizer.init(params), params)
    nans = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    _, left = take(nans, state, params, is_taken=False)
    for key, leaf in flat(left).items():
        expected = flat(state)[key]
        is_real = jnp.issubdtype(leaf.dtype, jnp.floating)
        np.testing.assert_array_equal(leaf, expected if is_real else expected + 1, err_msg=key)
    _, after = take(jax.tree.map(jnp.cos, params), left, params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


def adafactor(**settings):
    config = OptimizerConfig(name="adafactor", learning_rate=0.1, schedule="constant", **settings)
    return make_optimizer(config, num_steps=10)


def test_adafactor_state_is_factored_for_every_large_matrix():
    """T5 v1.1 base: the moments are vectors, attention's with K = 64 too."""
    config = t5.T5Config(d_model=768, d_ff=2048, num_heads=12, num_layers=12, num_decoder_layers=12)
    _, params = t5.abstract_params(config)
    state = jax.eval_shape(adafactor().init, params)
    num_state = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))
    assert t5.count_params(params) == 247_577_856
    # Rows and columns of each matrix, and the small tables whole: a thousandth of AdamW's.
    assert num_state < 0.004 * t5.count_params(params)


def test_adafactor_does_not_see_that_layers_are_stacked():
    """The stack's update is that of each layer alone: neither clipping nor scale is shared."""
    rng = np.random.default_rng(0)
    scales = {"encoder": [1.0, 7.0], "decoder": [5.0, 1.0, 0.2]}  # of different depth, as in ByT5
    layers = {
        stack: [scale * rng.normal(size=(128, 160)) for scale in of_layers]
        for stack, of_layers in scales.items()
    }
    params = {stack: {"layers": {"wi": jnp.asarray(x)}} for stack, x in layers.items()}
    params["lm_head"] = jnp.asarray(rng.normal(size=(128, 160)))
    grads = jax.tree.map(lambda x: jnp.sin(100 * x) + 0.1 * x, params)
    updates = update_once(adafactor(), grads, params)
    for stack in scales:
        for layer in range(len(scales[stack])):
            grad, param, update = (
                tree[stack]["layers"]["wi"][layer] for tree in (grads, params, updates)
            )
            alone = update_once(optax.adafactor(0.1), {"wi": grad}, {"wi": param})
            np.testing.assert_allclose(update, alone["wi"], rtol=1e-4)  # float32, other order


def test_adafactor_treats_heads_as_one_matrix():
    """[D, H, K] moves as [D, H*K] does under optax's own rule, and [H, K, D] as [H*K, D]."""
    key = jax.random.key(1)
    shapes = {"query": (128, 4, 64), "out": (4, 64, 128)}
    merged_shapes = {"query": (128, 256), "out": (256, 128)}
    params = {name: jax.random.normal(key, shape) for name, shape in shapes.items()}
    grads = jax.tree.map(lambda x: jnp.sin(3 * x), params)
    updates = update_once(adafactor(), as_single(grads), as_single(params))["single"]
    reference = optax.adafactor(0.1)
    for name, shape in merged_shapes.items():
        grad, param = grads[name].reshape(shape), params[name].reshape(shape)
        expected, state = reference.update(grad, reference.init(param), param)
        assert state[0].v.shape == (1,)  # factored
        np.testing.assert_allclose(updates[name].reshape(shape), expected, rtol=1e-5)


def test_adafactor_learning_rate_is_relative_to_the_matrix():
    params, grads = {"wo": jnp.full((4, 4), 3.0)}, {"wo": jnp.full((4, 4), 1e-4)}
    updates = update_once(adafactor(), as_single(grads), as_single(params))["single"]
    np.testing.assert_allclose(updates["wo"], -0.1 * 3.0, rtol=1e-5)


def as_single(tree):
    """A T5's tree of parameters with `tree` outside the stacks."""
    stack = {"layers": {"scale": jnp.ones((1, 1))}}
    return {"single": tree, "encoder": stack, "decoder": stack}


def update_once(optimizer, grads, params):
    return jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])(grads, params)
