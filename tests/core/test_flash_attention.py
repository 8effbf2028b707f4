"""The kernels against plain attention, interpreted; compiled for TPUs, lowered for GPUs."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from dslt.core import attention, flash_gpu, sharding, t5
from dslt.core.batch import ROLE_LABEL, empty_batch, pad_rows
from dslt.core.flash_attention import flash_attention
from dslt.core.flash_blocks import Static, block_ranges
from dslt.core.sharding import MeshConfig, make_mesh
from dslt.core.topology import compile_devices, parse_topology
from dslt.plan import QUICK

FLOAT32_SUMS = 3e-6  # of the largest entry: sums and exponentials in another order
BFLOAT16_SUMS = 2e-2  # of the largest: 8 bits, rounded before each product, weights not yet divided
PACKED = [[9, 4, 17, 3], [25, 8]]  # lengths of each row's segments; what remains is padding
SELF, CAUSAL, CROSS = (37, 37, False), (37, 37, True), (21, 50, False)


def segment_ids(lengths, length: int, order=None) -> np.ndarray:
    """[B, length] int32; `order` renames the segments of a row."""
    rows = np.zeros((len(lengths), length), np.int32)
    for row, parts in zip(rows, lengths, strict=True):
        ids = np.arange(1, len(parts) + 1) if order is None else np.array(order[: len(parts)])
        filled = np.repeat(ids, parts)[:length]
        row[: len(filled)] = filled
    return rows


def make_arrays(num_queries, num_keys, is_causal, dtype=np.float32, order=None, heads=3):
    """(queries, keys, values, bias, the result's gradient without padding), a SegmentMask."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    rows = len(PACKED)
    if num_queries == num_keys:
        query_segments = key_segments = segment_ids(PACKED, num_keys, order)
        bias = normal(heads, num_queries + num_keys - 1)
    else:  # cross-attention: targets are shorter than sources
        query_segments = segment_ids([[4, 2, 8, 3], [9, 8]], num_queries, order)
        key_segments = segment_ids(PACKED, num_keys, order)
        bias = None
    arrays = [normal(rows, length, heads, 8) for length in (num_queries, num_keys, num_keys)]
    d_out = normal(rows, num_queries, heads, 8) * (query_segments > 0)[..., None, None]
    arrays = [jnp.asarray(x, dtype) for x in arrays]
    return (*arrays, bias, d_out), attention.SegmentMask(query_segments, key_segments, is_causal)


def plain(queries, keys, values, bias, mask, rate, key):
    if bias is not None:
        bias = attention.expand_bias(bias, queries.shape[1])
    return attention.plain_attention(queries, keys, values, bias, mask.expand(), rate, key)


def flash_with(queries, keys, values, bias, mask, rate, key, platform, block=16):
    return flash_attention(
        queries, keys, values, bias, mask.query_segments, mask.key_segments,
        is_causal=mask.is_causal, dropout_rate=rate, dropout_key=key, block=block,
        platform=platform,
    )  # fmt: skip


@pytest.fixture(params=["tpu", "gpu"])
def flash(request):
    """The kernels of either kind of device."""
    return functools.partial(flash_with, platform=request.param)


def result_and_gradients(attend, arrays, mask, rate=0.0):
    """The result at real queries, and the gradients of queries, keys, values and bias."""
    *inputs, d_out = arrays
    key = jax.random.key(5) if rate else None

    @jax.jit
    def run(*inputs):
        out, pull_back = jax.vjp(lambda *inputs: attend(*inputs, mask, rate, key), *inputs)
        is_real = (mask.query_segments > 0)[..., None, None]
        return jnp.where(is_real, out, 0), pull_back(d_out.astype(out.dtype))

    return jax.device_get(run(*inputs))


def assert_near(found, expected, tolerance: float):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        one, other = one.astype(np.float32), other.astype(np.float32)
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("case", [SELF, CAUSAL, CROSS], ids=["self", "causal", "cross"])
def test_numbers_are_those_of_plain_attention(flash, case, rate):
    """Forward and all gradients, over several blocks of uneven lengths; dropout to the bit."""
    arrays, mask = make_arrays(*case)
    expected = result_and_gradients(plain, arrays, mask, rate)
    assert_near(result_and_gradients(flash, arrays, mask, rate), expected, FLOAT32_SUMS)
    without = result_and_gradients(plain, arrays, mask)
    assert (np.abs(without[0] - expected[0]).max() > 0.1) == bool(rate)


@pytest.mark.parametrize("block", [8, 64])
def test_blocks_change_nothing(flash, block):
    arrays, mask = make_arrays(*CAUSAL)
    expected = result_and_gradients(plain, arrays, mask, 0.3)
    found = result_and_gradients(functools.partial(flash, block=block), arrays, mask, 0.3)
    assert_near(found, expected, FLOAT32_SUMS)


def test_rows_and_offsets_share_the_sums_for_the_bias(monkeypatch):
    """Several rows a split of the GPU's kernel, unevenly; more blocks of queries than of keys."""
    monkeypatch.setattr(flash_gpu, "SPLITS", 2)
    rng = np.random.default_rng(2)
    queries, keys, values, d_out = (
        rng.normal(size=(5, length, 3, 8)).astype(np.float32) for length in (50, 21, 21, 50)
    )
    bias = rng.normal(size=(3, 70)).astype(np.float32)
    ends = [segment_ids([[7, 6], [21], [3, 2, 9], [], [12, 4]], length) for length in (50, 21)]
    mask = attention.SegmentMask(*ends, is_causal=False)
    d_out *= (ends[0] > 0)[..., None, None]
    arrays = queries, keys, values, bias, d_out
    on_gpu = functools.partial(flash_with, platform="gpu", block=8)
    expected = result_and_gradients(plain, arrays, mask, 0.3)
    assert_near(result_and_gradients(on_gpu, arrays, mask, 0.3), expected, FLOAT32_SUMS)


def test_segments_in_any_order(flash):
    arrays, mask = make_arrays(*SELF, order=[3, 1, 4, 2])
    expected = result_and_gradients(plain, arrays, mask)
    assert_near(result_and_gradients(flash, arrays, mask), expected, FLOAT32_SUMS)


@pytest.mark.parametrize("case", [CAUSAL, CROSS], ids=["causal", "cross"])
def test_bfloat16_is_near(flash, case):
    arrays, mask = make_arrays(*case, dtype=jnp.bfloat16)
    expected = result_and_gradients(plain, arrays, mask, 0.3)
    assert_near(result_and_gradients(flash, arrays, mask, 0.3), expected, BFLOAT16_SUMS)


def test_large_scores_do_not_overflow(flash):
    (queries, *others), mask = make_arrays(*SELF)
    arrays = (100 * queries, *others)
    expected = result_and_gradients(plain, arrays, mask)
    found = result_and_gradients(flash, arrays, mask)
    # A score of some hundreds has an error of 2**-24 times as much, and its exponential too.
    assert_near(found, expected, 100 * FLOAT32_SUMS)


def test_padding_gets_zeros_and_gives_nothing(flash):
    (queries, keys, values, bias, _), mask = make_arrays(*SELF)
    d_out = np.ones(queries.shape, np.float32)
    is_padding = mask.key_segments == 0
    noisy_keys, noisy_values = (
        jnp.where(is_padding[..., None, None], 1e4, x) for x in (keys, values)
    )

    def run(keys, values):
        attend = functools.partial(flash, mask=mask, rate=0.0, key=None)
        out, pull_back = jax.vjp(attend, queries, keys, values, bias)
        return out, pull_back(d_out)

    out, gradients = jax.jit(run)(keys, values)
    noisy = jax.jit(run)(noisy_keys, noisy_values)
    jax.tree.map(np.testing.assert_array_equal, noisy, (out, gradients))
    for array in (out, *gradients[:3]):
        assert not array[is_padding].any()
        assert np.abs(array[~is_padding]).min() > 0


def test_gradients_reach_only_the_past_and_the_own_segment(flash):
    (queries, keys, values, bias, _), mask = make_arrays(*CAUSAL)

    def at(keys, values, position):
        return flash(queries, keys, values, bias, mask, 0.0, None, block=8)[0, position].sum()

    reach = jax.jit(jax.grad(at, (0, 1)))
    for position, reached in ((11, range(9, 12)), (29, range(13, 30)), (34, [])):
        for gradient in reach(keys, values, position):
            found = np.flatnonzero(np.abs(gradient).sum((0, 2, 3)))
            np.testing.assert_array_equal(found, list(reached))


def test_blocks_that_share_no_segment_are_skipped():
    static = Static(1, 24, 24, 8, 8, False, 0.0)
    segments = np.repeat([1, 2, 3, 0], [10, 6, 4, 4])[None]  # blocks [1], [1, 2], [3, padding]
    of_queries, of_keys = block_ranges(static, segments, segments)
    np.testing.assert_array_equal(of_queries, [[0, 0, 2], [2, 2, 3]])
    np.testing.assert_array_equal(of_keys, of_queries)
    of_queries, of_keys = block_ranges(static._replace(is_causal=True), segments, segments)
    np.testing.assert_array_equal(of_queries, [[0, 0, 2], [1, 2, 3]])
    np.testing.assert_array_equal(of_keys, [[0, 1, 2], [2, 2, 3]])
    of_queries, _ = block_ranges(static, segments, np.zeros_like(segments))
    np.testing.assert_array_equal(of_queries, np.zeros((2, 3)))


@pytest.mark.parametrize("heads", [4, 3], ids=["heads_split", "heads_whole"])
def test_a_mesh_changes_nothing(flash, heads):
    """Dropout too: its bits belong to rows and heads of the whole batch."""
    arrays, mask = make_arrays(*CAUSAL, heads=heads)
    arrays = [x if x.shape[0] == heads else np.tile(x, (2, 1, 1, 1)) for x in arrays]
    mask = attention.SegmentMask(*(np.tile(x, (2, 1)) for x in mask[:2]), True)
    expected = result_and_gradients(plain, arrays, mask, 0.3)
    devices = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with sharding.inside(devices):
        arrays = jax.device_put(arrays, sharding.replicated(devices))
        found = result_and_gradients(flash, arrays, mask, 0.3)
    assert_near(found, expected, FLOAT32_SUMS)


TINY = dict(vocab_size=40, d_model=16, d_kv=16, d_ff=24, num_heads=2, num_layers=2)


def make_batch(rows: int, source_length: int = 14, target_length: int = 10):
    """Two segments a row, of lengths that vary with the row, and some padding."""
    rng = np.random.default_rng(1)
    batch = empty_batch(rows, source_length, target_length)
    for row in range(rows):
        split = 2 + row % 3
        batch.encoder_segment_ids[row, : source_length - 1] = np.where(
            np.arange(source_length - 1) < 2 * split, 1, 2
        )
        batch.decoder_segment_ids[row, : target_length - 1] = np.where(
            np.arange(target_length - 1) < split, 1, 2
        )
    batch.encoder_input_tokens[:] = rng.integers(2, 40, (rows, source_length))
    batch.decoder_input_tokens[:] = rng.integers(2, 40, (rows, target_length))
    batch.decoder_target_tokens[:] = rng.integers(2, 40, (rows, target_length))
    batch.decoder_loss_roles[batch.decoder_segment_ids > 0] = ROLE_LABEL
    batch.decoder_loss_weights[batch.decoder_segment_ids > 0] = 1.0
    return pad_rows(batch, 8)


@pytest.mark.parametrize("implementation", ["flash", "flash_gpu"])
@pytest.mark.parametrize("bias_per_layer", [False, True], ids=["bias_shared", "bias_per_layer"])
def test_a_train_step_is_that_of_plain_attention(bias_per_layer, implementation):
    """On eight devices, with dropout and rematerialised layers, against one device."""
    fields = dict(num_decoder_layers=1, remat=True, relative_bias_per_layer=bias_per_layer)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    batch = make_batch(6)

    def step(implementation, mesh):
        config = t5.T5Config(**TINY, **fields, attention=implementation)
        graphdef, params = t5.init_params(config, seed=0)

        def loss(params, batch):
            with sharding.inside(mesh):
                logits = nnx.merge(graphdef, params)(batch, jax.random.key(3))
            return (jnp.square(logits).mean(-1) * batch.decoder_loss_weights).sum()

        if mesh:
            params = jax.device_put(params, sharding.state_shardings(mesh, params))
        return jax.device_get(jax.jit(jax.value_and_grad(loss))(params, batch))

    expected, found = step("plain", None), step(implementation, mesh)
    assert_near(found, expected, FLOAT32_SUMS)
    for leaf in jax.tree.leaves(expected):
        assert np.abs(leaf).max() > 1e-3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("lengths", "is_causal", "head_dim"),
    [((512, 512), False, 64), ((136, 136), True, 128), ((128, 264), False, 16)],
    ids=["self", "causal", "cross"],
)
def test_the_kernels_lower_for_a_gpu_that_is_not_there(lengths, is_causal, head_dim, dtype, h100):
    """To Triton's language: one kernel forward, two or three backward."""
    num_queries, num_keys = lengths
    array = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    inputs = [array((2, length, 6, head_dim)) for length in (num_queries, num_keys, num_keys)]
    is_self = num_queries == num_keys
    bias = array((6, num_queries + num_keys - 1), dtype=jnp.float32) if is_self else None
    segments = [array((2, length), dtype=jnp.int32) for length in lengths]

    def loss(inputs, bias, segments):
        return flash_attention(
            *inputs, bias, *segments, is_causal=is_causal, dropout_rate=0.1,
            dropout_key=jax.random.key(0), platform="gpu",
        ).sum()  # fmt: skip

    with h100:
        traced = jax.jit(jax.grad(loss, (0, 1) if is_self else 0)).trace(inputs, bias, segments)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = re.findall(r'name = "(_\w+_kernel)"', program)
    expected = ["_forward_kernel", "_queries_kernel", "_keys_kernel", "_bias_kernel"]
    assert kernels == expected[: 4 if is_self else 3]


@pytest.fixture
def h100():
    """A mesh of one such GPU: later versions of JAX ask which one a kernel is for."""
    kinds = (1,) * 3, ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3
    if not hasattr(jax.sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh(*kinds, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def devices_of(name: str):
    """Devices to compile for; they need not be there."""
    topology = parse_topology(name)
    compiler = "libtpu" if topology.is_tpu else "jax_plugins.xla_cuda13"
    pytest.importorskip(compiler, reason=f"{name} needs its compiler: pip install '.[plan]'")
    return compile_devices(topology)


@pytest.mark.parametrize(
    ("topology", "dtype"),
    [
        *(("v5e:2x4", jnp.bfloat16), ("v5e:2x4", jnp.float32)),
        *(("v5p:2x2x1", jnp.bfloat16), ("v5p:2x2x1", jnp.float32)),
        *(("h100:1", jnp.bfloat16), ("h100:1", jnp.float32), ("a100:1", jnp.bfloat16)),
    ],
)
@pytest.mark.parametrize(
    ("lengths", "is_causal"),
    [((512, 512), False), ((640, 640), True), ((128, 512), False)],
    ids=["self", "causal", "cross"],
)
def test_the_kernels_compile_for_devices_that_are_not_there(topology, dtype, lengths, is_causal):
    """To machine code: two kernels on TPUs, three on GPUs and one more where there is a bias."""
    num_queries, num_keys = lengths
    device = devices_of(topology)[0]
    where = SingleDeviceSharding(device)

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    is_self = num_queries == num_keys
    bias = array(6, num_queries + num_keys - 1, dtype=jnp.float32) if is_self else None
    inputs = array(2, num_queries, 6, 64), array(2, num_keys, 6, 64), array(2, num_keys, 6, 64)
    segments = array(2, num_queries, dtype=jnp.int32), array(2, num_keys, dtype=jnp.int32)

    def run(queries, keys, values, bias, d_out, *segments):
        def attend(*inputs):
            return flash_attention(
                *inputs, *segments, is_causal=is_causal, dropout_rate=0.1,
                dropout_key=jax.random.key(0), platform=device.platform,
            )  # fmt: skip

        out, pull_back = jax.vjp(attend, queries, keys, values, bias)
        return out, pull_back(d_out)

    program = jax.jit(run).lower(*inputs, bias, inputs[0], *segments).compile().as_text()
    targets = re.findall(r'custom_call_target="([^"]*)"', program)
    kernels = {"tpu": "tpu_custom_call", "gpu": "__gpu$xla.gpu.triton"}[device.platform]
    assert targets.count(kernels) == (2 if device.platform == "tpu" else 3 + is_self)


def test_the_gradient_on_tpus_holds_no_scores():
    """Of 384 sources and 384 keys, padded to 512 in the kernel; plain attention does hold them."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices_of("v5e:2x4"))

    def scores(**fields):
        """Shapes in the compiled gradient that end in two lengths of the source."""
        fields |= dict(d_model=128, d_kv=64, num_decoder_layers=2, dtype="bfloat16", remat=True)
        graphdef, params = t5.abstract_params(t5.T5Config(**TINY | fields))

        def loss(params, batch):
            with sharding.inside(mesh):
                return nnx.merge(graphdef, params)(batch, jax.random.key(0)).mean()

        rows = sharding.batch_sharding(mesh)
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows),
            empty_batch(8, 384, 128),
        )
        lowered = jax.jit(jax.grad(loss)).lower(sharding.with_shardings(mesh, params), batch)
        program = lowered.compile(QUICK).as_text()
        return set(re.findall(r"\w+\[(?:\d+,)*(?:384|512),(?:384|512)\]", program))

    assert scores(attention="plain", attention_dropout_rate=0.0)
    assert not scores(attention="flash")
