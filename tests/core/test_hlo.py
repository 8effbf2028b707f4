"""Collectives are read from compiled programs whose collectives are known by construction."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dslt.core import hlo
from dslt.core.sharding import MeshConfig, make_mesh

ROWS = PartitionSpec(("data", "fsdp"), "tensor")


def compiled_text(function, shape, out_specs=ROWS) -> tuple[str, dict]:
    """`function` of each device's part of a float32 array, on data 2 × fsdp 2 × tensor 2."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=ROWS, out_specs=out_specs, check_vma=False)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, ROWS))
    return jax.jit(mapped).lower(x).compile().as_text(), mesh.shape


SHIFT = functools.partial(jax.lax.ppermute, axis_name="fsdp", perm=[(0, 1), (1, 0)])
# Of a part f32[4, 8], 128 bytes: what the array is that all members make or share, and what a
# device sends. A group of 2 sends half of it, of 4 three quarters; a sum to all twice that.
KNOWN = {
    "gather": (lambda x: jax.lax.all_gather(x, "tensor"), "all-gather", ("tensor",), 256, 128),
    "gather_two_axes": (
        lambda x: jax.lax.all_gather(x, ("data", "fsdp")),
        "all-gather",
        ("data", "fsdp"),
        512,
        384,
    ),
    "sum": (lambda x: jax.lax.psum(x, "data"), "all-reduce", ("data",), 128, 128),
    "sum_all": (
        lambda x: jax.lax.psum(x, ("data", "fsdp", "tensor")),
        "all-reduce",
        ("data", "fsdp", "tensor"),
        128,
        224,
    ),
    "scatter": (
        lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True),
        "reduce-scatter",
        ("fsdp",),
        128,
        64,
    ),
    "exchange": (
        lambda x: jax.lax.all_to_all(x, "tensor", 0, 0, tiled=True),
        "all-to-all",
        ("tensor",),
        128,
        64,
    ),
    "permute": (SHIFT, "collective-permute", ("fsdp",), 128, 128),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_collective_is_found(name):
    function, kind, axes, whole_bytes, sent_bytes = KNOWN[name]
    text, mesh_shape = compiled_text(function, (16, 16))
    (found,) = hlo.find_collectives(text, mesh_shape)
    assert (found.kind, found.axes, found.times) == (kind, axes, 1)
    assert (found.whole_bytes, found.sent_bytes) == (whole_bytes, sent_bytes)


def test_loops_multiply():
    def function(x):
        def inner(x, _):
            return jnp.sin(jax.lax.psum(x, "fsdp")), None

        def outer(x, _):
            return SHIFT(jax.lax.scan(inner, x, None, length=3)[0]), None

        return jax.lax.scan(outer, x, None, length=5)[0]

    text, mesh_shape = compiled_text(function, (16, 16))
    times = {found.kind: found.times for found in hlo.find_collectives(text, mesh_shape)}
    assert times == {"all-reduce": 15, "collective-permute": 5}


def test_a_loop_that_may_end_earlier_counts_to_its_bound():
    def function(x):
        def is_going_on(carry):
            return (carry[0] < 7) & (carry[1].sum() < 100.0)

        def once(carry):
            return carry[0] + 1, jnp.sin(jax.lax.psum(carry[1], "data"))

        return jax.lax.while_loop(is_going_on, once, (0, x))[1]

    text, mesh_shape = compiled_text(function, (16, 16))
    assert [found.times for found in hlo.find_collectives(text, mesh_shape)] == [7]


# As TPU compilers write them: groups named by axes of a mesh, a reduce-scatter as a fusion, the
# trip count in the loop's condition alone.
TPU_PROGRAM = """\
HloModule jit_step, is_scheduled=true

%add.1 (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[]{:T(512)} parameter(0)
  %b = bf16[]{:T(512)} parameter(1)
  ROOT %sum = bf16[]{:T(512)} add(%a, %b)
}

%all-reduce-scatter.5.clone (input.22: bf16[64,32]) -> bf16[16,32] {
  %input.22 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.257 = bf16[64,32]{1,0:T(8,128)(2,1)} all-reduce(%input.22), channel_id=46, \
replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, to_apply=%add.1
  ROOT %slice = bf16[16,32]{1,0} dynamic-slice(%all-reduce.257, %zero, %zero)
}

%body.2 (carry: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %carry = (s32[]{:T(128)}, bf16[64,32]{1,0}) parameter(0)
  %part = bf16[64,32]{1,0} get-tuple-element(%carry), index=1
  %all-gather.4 = bf16[1,64,32]{2,1,0:T(8,128)(2,1)} all-gather(%part), channel_id=3, \
replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
  %fusion.50 = bf16[16,32]{1,0} fusion(%part), kind=kCustom, calls=%all-reduce-scatter.5.clone
  ROOT %tuple = (s32[]{:T(128)}, bf16[64,32]{1,0}) tuple(%one, %part)
}

%condition.2 (carry.1: (s32[], bf16[64,32])) -> pred[] {
  %bound = s32[]{:T(128)} constant(24)
  %carry.1 = (s32[]{:T(128)}, bf16[64,32]{1,0}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%counter, %bound), direction=LT
}

ENTRY %main.9 (x: bf16[64,32]) -> bf16[64,32] {
  %x = bf16[64,32]{1,0} parameter(0)
  %start = (s32[]{:T(128)}, bf16[64,32]{1,0}) tuple(%zero, %x)
  %while.1 = (s32[]{:T(128)}, bf16[64,32]{1,0}) while(%start), condition=%condition.2, body=%body.2
  %all-reduce.9 = (f32[3,5]{1,0}, f32[]{:T(128)}) all-reduce(%y, %z), \
replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add.1
  ROOT %out = bf16[64,32]{1,0} get-tuple-element(%while.1), index=1
}
"""


def test_the_forms_of_a_tpu_program():
    found = {
        c.kind: (c.axes, c.group_size, c.type, c.times)
        for c in hlo.find_collectives(TPU_PROGRAM, {"data": 2, "fsdp": 4, "tensor": 1})
    }
    assert found == {
        "all-gather": (("fsdp",), 4, "bf16[1,64,32]", 24),
        "reduce-scatter": (("fsdp",), 4, "bf16[64,32]", 24),
        "all-reduce": (("data",), 2, "f32[3,5] + f32[]", 1),
    }
    sent = [c.sent_bytes for c in hlo.find_collectives(TPU_PROGRAM, {"data": 2, "fsdp": 4})]
    assert sorted(sent) == [64, 0.75 * 64 * 32 * 2, 0.75 * 64 * 32 * 2]


def test_a_group_that_is_no_product_of_axes_is_said_to_be_unknown():
    text = TPU_PROGRAM.replace("{{0,1,2,3},{4,5,6,7}}", "{{0,1,2,7},{4,5,6,3}}")
    found = hlo.find_collectives(text, {"data": 2, "fsdp": 4})
    assert {c.axes for c in found if c.kind == "reduce-scatter"} == {("?",)}


def test_a_callback_is_a_host_transfer():
    def function(x):
        jax.debug.callback(lambda x: None, x)
        return x * 2

    x = np.ones(8, np.float32)
    assert hlo.find_host_transfers(jax.jit(function).lower(x).compile().as_text())
    assert not hlo.find_host_transfers(jax.jit(jnp.sin).lower(x).compile().as_text())
