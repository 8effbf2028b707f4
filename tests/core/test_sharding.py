"""A step on a mesh of eight devices is the one-device step; every parameter has its place."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dslt.core import hlo, sharding, t5
from dslt.core.batch import PAD_ID, ROLE_LABEL, ROLE_RATIONALE, Batch, empty_batch, pad_rows
from dslt.core.optimizer import OptimizerConfig, make_optimizer
from dslt.core.sharding import PARTITION_RULES, MeshConfig, make_mesh, state_shardings
from dslt.core.train_step import GradientSettings, TrainState, init_state, train_step

ONE_DEVICE = MeshConfig(data=1, fsdp=1, tensor=1)
MESHES = {
    "data8": MeshConfig(data=8),
    "fsdp8": MeshConfig(data=1, fsdp=8),
    "fsdp4_tensor2": MeshConfig(data=1, fsdp=4, tensor=2),
    "data2_fsdp2_tensor2": MeshConfig(data=2, fsdp=2, tensor=2),
}
FLAVOURS = {
    "v1.0": dict(feed_forward_proj="relu", tie_word_embeddings=True, scale_decoder_outputs=True),
    "v1.1": {},
    "byt5": dict(num_layers=3),
    "umt5": dict(relative_bias_per_layer=True),
}
# Adafactor factors dimensions of 128 and more, so its model is wider.
WIDTHS = {
    "adamw": dict(d_model=16, d_kv=8, d_ff=24, num_heads=2),
    "adafactor": dict(d_model=128, d_kv=64, d_ff=128, num_heads=2),
}
# A step compiles in 1 s instead of 6, and these programs run for milliseconds.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}


def tiny_config(optimizer: str = "adamw", **overrides) -> t5.T5Config:
    layers = dict(vocab_size=40, num_layers=2, num_decoder_layers=2)
    return t5.T5Config(**layers | WIDTHS[optimizer] | overrides)


def mesh_of(config: MeshConfig):
    return make_mesh(config, jax.devices()[:1] if config == ONE_DEVICE else jax.devices())


def make_state(optimizer: str, graph_config: t5.T5Config):
    """Step 3 with moments that are not zero, as numpy.

    From zero moments the first AdamW update is the gradient's sign, which would turn the rounding
    of a gradient near zero into a whole step; with moments the update is smooth in the gradient.
    """
    rng = np.random.default_rng(0)
    graphdef, abstract = t5.abstract_params(graph_config)
    config = OptimizerConfig(name=optimizer, learning_rate=1.0, weight_decay=0.01, warmup_steps=2)
    transform = make_optimizer(config, num_steps=10)
    state = jax.eval_shape(functools.partial(init_state, optimizer=transform), abstract)

    def fill(low, high, leaf):
        if leaf.dtype == jnp.int32:
            return np.full(leaf.shape, 3, np.int32)  # counters
        return rng.uniform(low, high, leaf.shape).astype(np.float32)

    return (
        graphdef,
        transform,
        TrainState(
            step=np.int32(3),
            params=jax.tree.map(functools.partial(fill, -0.3, 0.3), state.params),
            opt_state=jax.tree.map(functools.partial(fill, 1e-3, 2e-3), state.opt_state),
        ),
    )


def make_batch(rows: int) -> Batch:
    """Two segments a row, one of each role, of lengths that vary with the row."""
    rng = np.random.default_rng(1)
    batch = empty_batch(rows, 12, 10)
    for row in range(rows):
        split = 2 + row % 3
        batch.encoder_input_tokens[row] = rng.integers(2, 40, 12)
        batch.encoder_segment_ids[row] = np.where(np.arange(12) < 5, 1, 2)
        batch.decoder_target_tokens[row] = rng.integers(2, 40, 10)
        batch.decoder_segment_ids[row] = np.where(np.arange(10) < split, 1, 2)
        batch.decoder_input_tokens[row, 1:] = batch.decoder_target_tokens[row, :-1]
        batch.decoder_input_tokens[row, [0, split]] = PAD_ID
        roles = [ROLE_LABEL] * split + [ROLE_RATIONALE] * (10 - split)
        batch.decoder_loss_roles[row] = roles if row % 2 else roles[::-1]
    batch.decoder_loss_weights[:] = 1.0
    return batch


def step_function(optimizer: str, dropout_rate: float, accumulation_steps: int, mesh):
    """The jitted step and its arguments, placed on the mesh as `train` places them."""
    graphdef, transform, state = make_state(
        optimizer, tiny_config(optimizer, dropout_rate=dropout_rate)
    )
    where = state_shardings(mesh, state)
    step = functools.partial(
        train_step,
        graphdef=graphdef,
        optimizer=transform,
        settings=GradientSettings(rationale_weight=0.5, accumulation_steps=accumulation_steps),
        clip_norm=0.1,
        mesh=mesh,
    )
    jitted = jax.jit(
        step,
        in_shardings=(where, sharding.batch_sharding(mesh)),
        out_shardings=(where, sharding.replicated(mesh)),
        donate_argnums=0,
        compiler_options=QUICK_COMPILE,
    )
    batch = pad_rows(make_batch(13), sharding.row_multiple(mesh_of(MESHES["data8"]), 2))
    assert batch.decoder_target_tokens.shape[0] == 16  # the same rows on every mesh
    state = jax.device_put(state, where)
    return jitted, state, jax.device_put(batch, sharding.batch_sharding(mesh))


@functools.cache
def take_step(optimizer: str, dropout_rate: float, accumulation_steps: int, config: MeshConfig):
    """After one step: state and metrics as numpy, the compiled program, the state's places."""
    mesh = mesh_of(config)
    jitted, state, batch = step_function(optimizer, dropout_rate, accumulation_steps, mesh)
    compiled = jitted.lower(state, batch).compile()
    state, metrics = compiled(state, batch)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.device_get(state), jax.device_get(metrics), compiled.as_text(), places


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# Together these have each mesh, each optimizer, dropout on and off, and 1 and 2 microbatches.
STEPS = [
    ("data8", "adamw", 0.2, 2),
    ("fsdp8", "adamw", 0.2, 2),
    ("fsdp4_tensor2", "adamw", 0.2, 2),
    ("data2_fsdp2_tensor2", "adamw", 0.2, 2),
    ("data2_fsdp2_tensor2", "adafactor", 0.0, 1),
]
OTHER_STEPS = [
    slow(mesh, optimizer, dropout_rate, accumulation)
    for mesh in MESHES
    for optimizer in WIDTHS
    for dropout_rate in (0.0, 0.2)
    for accumulation in (1, 2)
    if (mesh, optimizer, dropout_rate, accumulation) not in STEPS
]


@pytest.mark.parametrize(
    ("mesh", "optimizer", "dropout_rate", "accumulation"), [*STEPS, *OTHER_STEPS]
)
def test_step_equals_the_one_device_step(mesh, optimizer, dropout_rate, accumulation):
    """Dropout included. Float32 sums over rows in another order differ in their last bits."""
    expected, expected_metrics, *_ = take_step(optimizer, dropout_rate, accumulation, ONE_DEVICE)
    state, metrics, *_ = take_step(optimizer, dropout_rate, accumulation, MESHES[mesh])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), metrics, expected_metrics
    )
    before = make_state(optimizer, tiny_config(optimizer))[-1]
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), expected.params, before.params)
    assert min(jax.tree.leaves(moved)) > 1e-3  # a thousand times what may differ
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max()),
        state,
        expected,
    )
    assert expected.step == 4
    assert metrics.sums.tokens.sum() == 130


def collectives(program: str) -> set[str]:
    names = "all-to-all|collective-permute|all-reduce|all-gather|reduce-scatter"
    return set(re.findall(rf" ({names})(?:-start)?\(", program))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_data_parallel_step_needs_all_reduce_alone(accumulation):
    """Roles are data and rows are dealt in turn, so no row travels to another device."""
    *_, program, _ = take_step("adamw", 0.2, accumulation, MESHES["data8"])
    assert collectives(program) == {"all-reduce"}
    *_, program, _ = take_step("adamw", 0.2, 2, MESHES["fsdp8"])
    assert "all-gather" in collectives(program)  # the search does find what is there


@pytest.mark.parametrize("mesh", MESHES)
def test_roles_move_no_row_and_the_host_is_left_alone(mesh):
    """No all-to-all and no permutation, in either of two microbatches; no callback, no infeed."""
    *_, program, _ = take_step("adamw", 0.2, 2, MESHES[mesh])
    found = hlo.find_collectives(program, mesh_of(MESHES[mesh]).shape)
    assert {c.kind for c in found} <= {"all-reduce", "all-gather", "reduce-scatter"}
    assert all(c.times and "?" not in c.axes for c in found)
    assert hlo.find_host_transfers(program) == []


@pytest.mark.parametrize("mesh", ["fsdp8", "fsdp4_tensor2", "data2_fsdp2_tensor2"])
def test_parameters_travel_and_activations_stay(mesh):
    """No collective of an fsdp step makes [8, length, ...]: a microbatch's whole activation."""
    *_, program, _ = take_step("adamw", 0.2, 2, MESHES[mesh])
    made = re.findall(r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute)", program)
    assert re.search(r"f32\[16,24|f32\[16,12\]", " ".join(made))  # wi_0, gathered
    assert not re.search(r"\w+\[8,(10|12),", " ".join(made))


@pytest.mark.parametrize("mesh", MESHES)
def test_of_hidden_units_three_arrays_a_layer_are_kept(mesh):
    """What is activated, by both of its products, and the outcome: also where fsdp gathers again,
    with a policy that keeps whatever it meets.
    """
    num_layers, num_hidden = 2, 56
    graphdef, params = t5.abstract_params(tiny_config(dropout_rate=0.2, d_ff=num_hidden))
    batch, key = make_batch(16), jax.random.key(0)

    def backward(params):
        return jax.vjp(lambda params: nnx.merge(graphdef, params)(batch, key), params)[1]

    with sharding.inside(mesh_of(MESHES[mesh])):
        kept = [x.size for x in jax.tree.leaves(jax.eval_shape(backward, params))]
    inputs = batch.encoder_input_tokens, batch.decoder_input_tokens
    sizes = (num_layers * tokens.size * num_hidden for tokens in inputs)
    assert [kept.count(size) for size in sizes] == [3, 3]


def test_stacked_roles_would_move_rows():
    """What the interleaved layout avoids: splitting the rows into halves costs collectives."""
    where = sharding.batch_sharding(mesh_of(MESHES["data8"]))
    halves = jax.jit(lambda x: x[:8] * 2 + x[8:], in_shardings=where, out_shardings=where)
    program = halves.lower(jnp.ones((16, 8))).compile().as_text()
    assert collectives(program) - {"all-reduce"}


def shard_shape(leaf) -> tuple[int, ...]:
    (shape,) = {shard.data.shape for shard in leaf.addressable_shards}
    return shape


def test_parameters_and_their_moments_are_split():
    """On fsdp=4 × tensor=2, before the step and after it."""
    mesh = mesh_of(MESHES["fsdp4_tensor2"])
    _, state, _ = step_function("adamw", 0.2, 1, mesh)
    adam = state.opt_state[0]
    for tree in (state.params, adam.mu, adam.nu):
        layers = tree["decoder"]["layers"]
        assert shard_shape(layers["feed_forward"]["wi_0"]) == (2, 4, 12)  # of 2, 16, 24
        assert shard_shape(layers["feed_forward"]["wo"]) == (2, 12, 4)  # of 2, 24, 16
        assert shard_shape(layers["cross_attention"]["query"]) == (2, 4, 1, 8)  # of 2, 16, 2, 8
        assert shard_shape(layers["cross_attention"]["out"]) == (2, 1, 8, 4)  # of 2, 2, 8, 16
        assert shard_shape(layers["self_attention_norm"]["scale"]) == (2, 16)
        assert shard_shape(tree["token_embedding"]) == (20, 4)  # of 40, 16
        assert shard_shape(tree["lm_head"]) == (4, 20)  # of 16, 40
        assert shard_shape(tree["encoder"]["relative_bias"]["embedding"]) == (32, 1)  # of 32, 2
    assert shard_shape(adam.count) == ()
    *_, places = take_step("adamw", 0.2, 2, MESHES["fsdp4_tensor2"])
    jax.tree.map(
        lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim) or pytest.fail(place),
        state,
        places,
    )


def test_factored_moments_are_whole_on_every_device():
    """A [L, D] row moment of a stacked [L, D, F] has a matrix's rank, but is none."""
    mesh = mesh_of(MESHES["data2_fsdp2_tensor2"])
    _, state, _ = step_function("adafactor", 0.0, 1, mesh)
    moments = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if path[-1] in map(jax.tree_util.DictKey, ("wi_0", "wo", "query", "out"))
        and leaf.size > leaf.shape[0]
    ]
    assert {leaf.shape for leaf in moments} == {(2, 128)}  # of 2, 128, 128: factored
    assert all(leaf.sharding.is_fully_replicated for leaf in moments)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_parameter_has_a_rule(flavour):
    _, params = t5.abstract_params(tiny_config(**FLAVOURS[flavour]))
    where = state_shardings(mesh_of(MESHES["data2_fsdp2_tensor2"]), params)
    for path, place in jax.tree_util.tree_leaves_with_path(where):
        names = [part.key for part in path]
        expected = {"fsdp", "tensor"}
        if names[-1] == "scale":
            expected = set()
        elif names[-2:] == ["relative_bias", "embedding"]:
            expected = {"tensor"}
        assert {axis for axis in place.spec if axis} == expected, names
        assert "layers" not in names or place.spec[0] is None, names


def test_a_parameter_without_a_rule_is_refused():
    mesh = mesh_of(ONE_DEVICE)
    params = {"encoder": {"layers": {"gate": jax.ShapeDtypeStruct((2, 16, 16), jnp.float32)}}}
    with pytest.raises(ValueError, match=r"encoder/layers/gate .*\(2, 16, 16\).*PARTITION_RULES"):
        state_shardings(mesh, params)


def test_every_rule_is_used():
    used = set()
    for flavour in FLAVOURS.values():
        _, params = t5.abstract_params(tiny_config(**flavour))
        for path, _ in jax.tree_util.tree_leaves_with_path(params):
            names = tuple(part.key for part in path)
            used |= {suffix for suffix in PARTITION_RULES if names[-len(suffix) :] == suffix}
    assert used == set(PARTITION_RULES)


def test_an_axis_that_does_not_divide_is_dropped():
    mesh = mesh_of(MESHES["fsdp4_tensor2"])
    odd = {"token_embedding": jax.ShapeDtypeStruct((41, 16), jnp.float32)}
    assert state_shardings(mesh, odd)["token_embedding"].spec == PartitionSpec(None, "fsdp")


def test_with_shardings_says_shape_type_and_place():
    mesh = mesh_of(MESHES["fsdp8"])
    _, params = t5.abstract_params(tiny_config())
    placed = sharding.with_shardings(mesh, params)
    jax.tree.map(
        lambda a, b, where: (
            (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, where)
            or pytest.fail(f"{a} is not {b} at {where}")
        ),
        placed,
        params,
        state_shardings(mesh, params),
    )


@pytest.mark.parametrize(
    "spec", [PartitionSpec(("data", "fsdp")), PartitionSpec("data", None, "tensor")]
)
def test_dropout_masks_are_those_of_one_device(spec):
    """To the bit: the random bits are a function of the position in the global array."""
    mesh = mesh_of(MESHES["data2_fsdp2_tensor2"])
    drop = functools.partial(t5.dropout, rate=0.4, key=jax.random.key(7))
    x = np.ones((8, 6, 16), np.float32)
    expected = jax.jit(drop)(x)
    where = NamedSharding(mesh, spec)
    masked = jax.jit(drop, in_shardings=where, out_shardings=where)(x)
    assert not masked.sharding.is_fully_replicated
    np.testing.assert_array_equal(masked, expected)
    assert 0.3 < np.mean(expected == 0) < 0.5
    for axis in range(3):  # rows, positions and units each draw their own
        assert np.any(expected != np.roll(expected, 1, axis))


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=2, fsdp=-1), (2, 4, 1)),
        (MeshConfig(data=-1, fsdp=2, tensor=4), (1, 2, 4)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 2)),
    ],
)
def test_mesh_shape(config, shape):
    mesh = make_mesh(config)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == shape
    assert sharding.row_multiple(mesh, 3) == shape[0] * shape[1] * 3


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=3),
        MeshConfig(data=-1, fsdp=3),
        MeshConfig(data=-1, fsdp=-1),
        MeshConfig(data=0),
        MeshConfig(data=-2),
        MeshConfig(data=4, fsdp=4),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(config):
    with pytest.raises(ValueError, match=r"MeshConfig\(.*(expected|devices)"):
        make_mesh(config)


def test_padded_rows_divide_over_the_devices():
    mesh = mesh_of(MESHES["data2_fsdp2_tensor2"])
    batch = pad_rows(make_batch(5), sharding.row_multiple(mesh, accumulation_steps=2))
    placed = jax.device_put(batch, sharding.batch_sharding(mesh))
    assert shard_shape(placed.encoder_input_tokens) == (2, 12)  # of 8 rows, over data and fsdp
    assert (batch.decoder_target_tokens[5:] == PAD_ID).all()


def test_one_process_holds_all_rows_and_puts_them_in_order():
    mesh = mesh_of(MESHES["data2_fsdp2_tensor2"])
    rows = sharding.local_rows(mesh, 8)
    assert rows.tolist() == list(range(8))
    array = np.arange(24).reshape(8, 3)
    placed = sharding.put_rows(array, mesh, rows, 8)
    assert placed.sharding == sharding.batch_sharding(mesh)
    np.testing.assert_array_equal(placed, array)
    np.testing.assert_array_equal(sharding.put_rows(array, mesh), array)


def test_a_process_gives_its_devices_their_rows_wherever_they_lie(monkeypatch):
    """On a v5e slice of 16 x 16 chips process 0 holds the rows 0, 1, 16 and 17 of 256."""
    monkeypatch.setattr(jax, "make_array_from_callback", lambda shape, _, rows_of: (shape, rows_of))
    part = np.arange(12).reshape(4, 3)
    mesh = mesh_of(MESHES["data8"])
    shape, rows_of = sharding.put_rows(part, mesh, np.array([0, 1, 16, 17]), 256)
    assert shape == (256, 3)
    np.testing.assert_array_equal(rows_of((slice(0, 2), slice(None))), part[:2])
    np.testing.assert_array_equal(rows_of((slice(17, 18), slice(None))), part[3:])


@pytest.mark.parametrize(
    ("sizes", "num_heads", "expected"),
    [
        ((16, 1, 1), 12, (4, 1, 1)),
        ((1, 8, 2), 12, (1, 1, 4)),
        ((2, 1, 8), 12, (1, 1, 4)),
        ((2, 3, 4), 12, (1, 1, 4)),
        ((1, 8, 1), 6, (2, 1, 2)),
    ],
)
def test_decoding_splits_heads_over_a_process_own_devices(sizes, num_heads, expected):
    """As many as split parameters in training, as far as these go."""
    own = jax.devices()[4:]
    shape = dict(zip(sharding.AXES, sizes, strict=True))
    whole = SimpleNamespace(shape=shape, local_devices=own)
    mesh = sharding.decoding_mesh(whole, num_heads)
    assert tuple(mesh.shape.values()) == expected
    assert mesh.devices.flatten().tolist() == own


def fake_devices(num_slices: int, per_slice: int) -> list[SimpleNamespace]:
    """CPU devices, dealt to slices in turn: their order alone does not group them."""
    return [
        SimpleNamespace(id=i, platform="cpu", device_kind="cpu", slice_index=i % num_slices)
        for i in range(num_slices * per_slice)
    ]


@pytest.mark.parametrize(
    ("sizes", "slices_along"),
    [((8, 1, 2), "data"), ((4, 2, 2), "data"), ((1, 8, 2), "fsdp"), ((2, 4, 2), "both")],
)
def test_slices_lie_along_data_then_along_fsdp(sizes, slices_along):
    order = sharding.order_devices(sizes, fake_devices(num_slices=4, per_slice=4))
    assert order.shape == sizes
    assert sorted(device.id for device in order.flat) == list(range(16))
    slices = np.vectorize(lambda device: device.slice_index)(order)
    assert np.all(slices == slices[:, :, :1])  # tensor never leaves a slice
    blocks = {
        "data": slices.reshape(4, -1),
        "fsdp": slices.reshape(4, -1),
        "both": slices.reshape(2, 2, 2, 2).reshape(4, -1),
    }[slices_along]
    assert [set(block.tolist()) for block in blocks] == [{0}, {1}, {2}, {3}]


def test_tensor_across_slices_is_refused():
    with pytest.raises(ValueError, match="would split tensor over 4 slices; choose data"):
        sharding.order_devices((1, 2, 8), fake_devices(num_slices=4, per_slice=4))


def test_devices_of_one_slice_without_a_topology_keep_their_order():
    order = sharding.order_devices((2, 4, 1), jax.devices())
    assert order.flatten().tolist() == jax.devices()
