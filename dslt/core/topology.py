"""Slices by name, what their chips have, and devices to compile for that need not be there.

    topology = parse_topology("v5litepod-32")  # v5e:4x8
    mesh = make_mesh(mesh_config, compile_devices(topology))

Names: `v5e:4x8` as JAX has them, `v5litepod-32` or `v5e-32` as Google Cloud has them, `h100:8` for
a GPU host, `cpu:8` for simulated host devices.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re

import jax

from dslt.core import gpu_target
from dslt.core.flops import PEAK_FLOPS
from dslt.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What bounds a step on one chip.

    Attributes:
      kind: how JAX's `device_kind` begins; the key of PEAK_FLOPS.
      hbm_bytes: what a program may use of it; None where no device memory bounds it.
      hbm_bandwidth: bytes a second.
      link_bandwidth: bytes a second that a chip can send at most, over all its ports (ICI, NVLink).
    """

    kind: str
    hbm_bytes: int | None
    hbm_bandwidth: float | None = None
    link_bandwidth: float | None = None

    @property
    def peak_flops(self) -> float | None:
        return PEAK_FLOPS.get(self.kind)


# Sources. Bandwidths: Google Cloud's pages of TPU v4, v5e, v5p and v6e (links: half of the
# bidirectional figure), NVIDIA's data sheets of the SXM modules (NVLink: likewise half). Memory of
# TPUs: what libtpu 0.0.42 lets a program have, from its own messages. Of GPUs: nine tenths of the
# data sheet's; JAX takes three quarters unless XLA_PYTHON_CLIENT_MEM_FRACTION says more.
CHIPS = {
    "v4": Chip("TPU v4", int(30.75 * GIB), 1228e9, 300e9),
    "v5e": Chip("TPU v5 lite", int(15.75 * GIB), 819e9, 200e9),
    "v5p": Chip("TPU v5", int(95.74 * GIB), 2765e9, 600e9),
    "v6e": Chip("TPU v6 lite", int(31.25 * GIB), 1638e9, 400e9),
    "a100-40gb": Chip("NVIDIA A100", int(0.9 * 40e9), 1555e9, 300e9),
    "a100": Chip("NVIDIA A100", int(0.9 * 80e9), 2039e9, 300e9),
    "h100": Chip("NVIDIA H100", int(0.9 * 80e9), 3350e9, 450e9),
    "h200": Chip("NVIDIA H200", int(0.9 * 141e9), 4800e9, 450e9),
    "cpu": Chip("cpu", None),
}
TPU_VERSIONS = ("v4", "v5e", "v5p", "v6e")

# The slices that Google Cloud rents, by chips. v4 and v5p are tori of three dimensions, and their
# names count TensorCores, two a chip. Source: the same pages, "Configurations".
SLICES_2D = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
SLICES_3D = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
}
CORES_PER_CHIP_IN_NAMES = {"v4": 2, "v5p": 2, "v5e": 1, "v6e": 1}

# Windowed einsums, TPU's default, cut each gather into a loop of permutations inside the product.
# libtpu 0.0.42 overflows its stack on them for T5 Large on v5e:2x4 (128 rows of 1,024).
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
# Products fused into products: estimating the cost of three overflows the same stack, as in train
# steps of plain attention with dropout (not in libtpu 0.0.50). With the kernel nothing changes.
TPU_TRAIN_OPTIONS = TPU_OPTIONS | {"xla_tpu_dot_dot_fusion": "false"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      version: a key of CHIPS.
      shape: chips along each dimension of the torus; (n,) for GPUs and CPUs.
    """

    version: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.version]

    @property
    def platform(self) -> str:
        """Of its devices, as JAX calls it: `tpu`, `gpu` or `cpu`."""
        return "tpu" if self.is_tpu else "gpu" if self.is_gpu else "cpu"

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def is_tpu(self) -> bool:
        return self.version in TPU_VERSIONS

    @property
    def is_gpu(self) -> bool:
        return self.version in gpu_target.TARGETS

    @property
    def is_estimate(self) -> bool:
        """Whether its compiler is missing: what is said of it then comes from the CPU's program."""
        return self.is_gpu and not gpu_target.has_compiler()

    def __str__(self) -> str:
        return f"{self.version}:{'x'.join(map(str, self.shape))}"


def parse_topology(name: str) -> Topology:
    """A topology from either form of its name; raises InputError where there is none."""
    text = name.lower().strip().replace("v5litepod", "v5e")
    version, separator, rest = re.match(r"(.*?)(?:([:-])(\d[\dx]*))?$", text).groups("")
    if version == "gpu":
        gpus = ", ".join(f"{key}:8" for key in gpu_target.TARGETS)
        raise InputError(f"--topology {name}: say which GPU, one of {gpus}")
    if version not in CHIPS or not rest:
        raise InputError(
            f"--topology {name}: expected a TPU slice such as v5e:4x8, v5litepod-32 or v4-32 "
            f"(versions {', '.join(TPU_VERSIONS)}), a GPU host such as h100:8, or cpu:8"
        )
    if version not in TPU_VERSIONS:
        count = _count(name, rest)
        hosts, others = divmod(count, gpu_target.GPUS_PER_HOST)
        if version in gpu_target.TARGETS and hosts and others:
            near = [f"{version}:{n * gpu_target.GPUS_PER_HOST}" for n in (hosts, hosts + 1)]
            raise InputError(
                f"--topology {name}: hosts have eight GPUs; expected {near[0]} or {near[1]}"
            )
        return Topology(version, (count,))
    if separator == ":" and "x" in rest:
        shape = tuple(_count(name, part) for part in rest.split("x"))
        if len(shape) != len(slices(version)[0].shape):
            raise InputError(
                f"--topology {name}: has {len(shape)} dimensions; expected one such as "
                f"{slices(version)[-1]}"
            )
        return Topology(version, shape)
    chips, odd = divmod(_count(name, rest), CORES_PER_CHIP_IN_NAMES[version])
    for topology in slices(version):
        if topology.num_chips == chips and not odd:
            return topology
    names = ", ".join(cloud_name(topology) for topology in slices(version))
    raise InputError(f"--topology {name}: no such slice; expected one of {names}, or {version}:AxB")


def slices(version: str) -> list[Topology]:
    """The slices of a TPU version that can be rented, the smallest first; of GPUs, one host's."""
    if version in gpu_target.TARGETS:
        return [Topology(version, (count,)) for count in (1, 2, 4, gpu_target.GPUS_PER_HOST)]
    shapes = SLICES_3D if version in ("v4", "v5p") else SLICES_2D
    return [Topology(version, tuple(map(int, shape.split("x")))) for shape in shapes.values()]


def one_host(topology: Topology) -> Topology:
    """The chips of one of its hosts: what a program that waits for no other process runs on."""
    devices = compile_devices(topology)
    num_own = sum(device.process_index == devices[0].process_index for device in devices)
    if num_own == topology.num_chips:
        return topology
    return next(part for part in slices(topology.version) if part.num_chips == num_own)


def cloud_name(topology: Topology) -> str:
    """What Google Cloud calls a TPU slice: `v5litepod-32`, `v4-64`."""
    count = topology.num_chips * CORES_PER_CHIP_IN_NAMES[topology.version]
    return f"{'v5litepod' if topology.version == 'v5e' else topology.version}-{count}"


def compile_devices(topology: Topology) -> list[jax.Device]:
    """Devices that can be compiled for; nothing can be run on a TPU's or a GPU's.

    Where GPUs' compiler is missing, host devices stand for them.

    Raises:
      InputError: libtpu is missing or does not know the topology, or fewer host devices are there.
    """
    if topology.platform == "cpu" or topology.is_estimate:
        return _host_devices(topology)
    if topology.is_gpu:
        bandwidth = topology.chip.hbm_bandwidth
        return gpu_target.devices(topology.version, topology.num_chips, bandwidth)
    # libtpu would look for other processes' chips and for a cloud's metadata server.
    quiet = {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_LOG_DIR": "disabled",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    for variable, value in quiet.items():
        os.environ.setdefault(variable, value)
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"{topology}: compiling for TPUs needs libtpu, which runs without a TPU; install it "
            "with pip install '.[plan]' from a checkout, or plan for cpu:8"
        )
    from jax.experimental import topologies

    options = {"chip_config_name": "megacore"} if topology.version == "v4" else {}
    if topology.num_chips == 1:
        options["chips_per_host_bounds"] = (1,) * 3
    try:
        return topologies.get_topology_desc(str(topology), "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        names = ", ".join(map(str, slices(topology.version)))
        raise InputError(f"{topology}: {reason}. Slices: {names}") from None


def _host_devices(topology: Topology) -> list[jax.Device]:
    """CPU devices; makes so many where JAX has not begun to use any."""
    with contextlib.suppress(RuntimeError):  # JAX runs already, with as many as it has
        jax.config.update("jax_num_cpu_devices", topology.num_chips)
    devices = jax.devices("cpu")
    if len(devices) < topology.num_chips:
        raise InputError(
            f"{topology}: there are {len(devices)} host devices; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.num_chips}"
        )
    return devices[: topology.num_chips]


def compiler_options(device: jax.Device, is_training: bool) -> dict[str, str] | None:
    """What train steps or decoding are compiled with, on devices and in planning."""
    if device.platform != "tpu":
        return None
    return TPU_TRAIN_OPTIONS if is_training else TPU_OPTIONS


def _count(name: str, text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"--topology {name}: {text!r} is no count of chips")
    return int(text)
