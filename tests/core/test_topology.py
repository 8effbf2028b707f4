"""Names of slices, and what is said where there is none of that name."""

import sys

import jax
import pytest

from dslt.core import gpu_target
from dslt.core.topology import (
    CHIPS,
    TPU_VERSIONS,
    cloud_name,
    compile_devices,
    one_host,
    parse_topology,
    slices,
)
from dslt.errors import InputError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v5e:4x8", "v5e:4x8"),
        ("v5litepod-32", "v5e:4x8"),
        ("v5e-32", "v5e:4x8"),
        ("V6E-8", "v6e:2x4"),
        ("v5e-1", "v5e:1x1"),
        ("v4-32", "v4:2x2x4"),  # 32 TensorCores
        ("v4:2x2x2", "v4:2x2x2"),
        ("v5p-8", "v5p:2x2x1"),
        ("cpu:8", "cpu:8"),
        ("h100:8", "h100:8"),
        ("a100-40gb:4", "a100-40gb:4"),
    ],
)
def test_names(name, expected):
    assert str(parse_topology(name)) == expected


@pytest.mark.parametrize("version", TPU_VERSIONS)
def test_both_forms_of_a_name_say_the_same(version):
    for topology in slices(version):
        assert parse_topology(str(topology)) == topology
        assert parse_topology(cloud_name(topology)) == topology


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v9:2x2", "v5litepod-32"),
        ("v5e", "expected a TPU slice"),
        ("v5e-12", "no such slice; expected one of v5litepod-1, "),
        ("v4-9", "no such slice"),
        ("v4:2x2", "has 2 dimensions; expected one such as v4:8x8x8"),
        ("v5e:0x4", "no count of chips"),
        ("gpu:8", "say which GPU, one of .*h100:8"),
        ("h100:12", "hosts have eight GPUs; expected h100:8 or h100:16"),
        ("cpu:2x2", "no count of chips"),
    ],
)
def test_a_name_of_nothing_is_refused(name, says):
    with pytest.raises(InputError, match=says):
        parse_topology(name)


def test_every_chip_but_the_cpu_has_its_roofs():
    for name, chip in CHIPS.items():
        roofs = (chip.peak_flops, chip.hbm_bandwidth, chip.link_bandwidth, chip.hbm_bytes)
        assert all(roofs) or name == "cpu", name


def test_host_devices_are_those_of_the_process():
    devices = jax.devices()  # eight, before anybody asks for another number
    assert compile_devices(parse_topology("cpu:4")) == devices[:4]
    with pytest.raises(InputError, match=r"8 host devices.*device_count=64"):
        compile_devices(parse_topology("cpu:64"))


def test_missing_libtpu_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(InputError, match=r"pip install '\.\[plan\]'"):
        compile_devices(parse_topology("v5e:2x2"))


def test_tpu_devices():
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: pip install '.[plan]'")
    assert [d.device_kind for d in compile_devices(parse_topology("v5e-8"))] == ["TPU v5 lite"] * 8
    assert len(compile_devices(parse_topology("v4-8"))) == 4  # one device a chip, as on the machine
    for one_chip in ("v6e-1", "v4:1x1x1"):
        assert len(compile_devices(parse_topology(one_chip))) == 1
    with pytest.raises(InputError, match=r"v5e:3x5: .*Slices: v5e:1x1, "):
        compile_devices(parse_topology("v5e:3x5"))


def test_gpu_devices():
    reason = "compiling for GPUs needs their compiler: pip install '.[plan]'"
    pytest.importorskip("jax_plugins.xla_cuda13", reason=reason)
    devices = compile_devices(parse_topology("h200:3"))
    assert [d.device_kind for d in devices] == ["NVIDIA H200"] * 3
    devices = compile_devices(parse_topology("a100-40gb:16"))
    assert [d.process_index for d in devices] == [0] * 8 + [1] * 8
    assert one_host(parse_topology("a100-40gb:16")) == parse_topology("a100-40gb:8")


def test_without_their_compiler_host_devices_stand_for_gpus(monkeypatch):
    monkeypatch.setattr(gpu_target, "has_compiler", lambda: False)
    topology = parse_topology("h100:4")
    assert topology.is_estimate and topology.platform == "gpu"
    assert compile_devices(topology) == jax.devices()[:4]
