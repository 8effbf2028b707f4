"""What XLA's GPU compiler must know of a GPU that is not there.

    mesh = make_mesh(mesh_config, devices("h100", 8, hbm_bandwidth=3350e9))

Source: NVIDIA's CUDA programming guide (limits by compute capability) and the data sheets and
white papers of the A100, H100 and H200, SXM modules.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
from typing import NamedTuple

GPUS_PER_HOST = 8


class GpuTarget(NamedTuple):
    """One kind of GPU.

    Attributes:
      name: as its driver gives it.
      compute_capability: major; the minor is 0.
      multiprocessors: of the module.
      float32_lanes, shared_bytes, most_shared_bytes: of a multiprocessor; the last what one block
        may have.
      l2_bytes, memory_bytes: of the module.
      clock_ghz: the boost clock.
    """

    name: str
    compute_capability: int
    multiprocessors: int
    float32_lanes: int
    shared_bytes: int
    most_shared_bytes: int
    l2_bytes: int
    clock_ghz: float
    memory_bytes: int


_A100 = 8, 108, 64, 164 * 1024, 163 * 1024, 40 * 2**20, 1.41
_H100 = 9, 132, 128, 228 * 1024, 227 * 1024, 50 * 2**20, 1.98
TARGETS = {
    "a100-40gb": GpuTarget("NVIDIA A100-SXM4-40GB", *_A100, 42_331_013_120),
    "a100": GpuTarget("NVIDIA A100-SXM4-80GB", *_A100, 85_100_068_864),
    "h100": GpuTarget("NVIDIA H100 80GB HBM3", *_H100, 84_942_979_072),
    "h200": GpuTarget("NVIDIA H200", *_H100, 151_397_597_184),
}


def has_compiler() -> bool:
    """Whether JAX's CUDA plugin is installed, which compiles without a GPU and without CUDA."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    found = [importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (13, 12)]
    return any(spec and spec.origin for spec in found)  # what an uninstall leaves has no file


def has_cudnn() -> bool:
    """Whether cuDNN's wheel is installed, without which programs that call it cannot be traced."""
    for version in (13, 12):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return bool(importlib.metadata.version(f"nvidia-cudnn-cu{version}"))
    return False


def devices(version: str, num_gpus: int, hbm_bandwidth: float) -> list:
    """GPUs to compile for, on which nothing can run.

    Args:
      num_gpus: eight at most, or a multiple of eight: of hosts that have eight each.
    """
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # what it runs with is not asked
    from jax.experimental import topologies

    a_host = min(num_gpus, GPUS_PER_HOST)
    shape = f"1x{num_gpus // a_host}x{a_host}"
    config = _target_config(TARGETS[version], hbm_bandwidth)
    description = topologies.get_topology_desc("", "cuda", target_config=config, topology=shape)
    return description.devices


def _target_config(target: GpuTarget, hbm_bandwidth: float) -> str:
    """A `stream_executor.GpuTargetConfigProto` as text."""
    # Hopper's own instructions, such as its products of matrices, are those of "9.0a".
    extension = "ACCELERATED_FEATURES" if target.compute_capability >= 9 else "NONE"
    return f"""
gpu_device_info {{
  cuda_compute_capability {{
    major: {target.compute_capability}
    feature_extension: {extension}
  }}
  core_count: {target.multiprocessors}
  fpus_per_core: {target.float32_lanes}
  clock_rate_ghz: {target.clock_ghz}
  shared_memory_per_core: {target.shared_bytes}
  shared_memory_per_block_optin: {target.most_shared_bytes}
  shared_memory_per_block: {48 * 1024}
  l2_cache_size: {target.l2_bytes}
  memory_bandwidth: {int(hbm_bandwidth)}
  device_memory_size: {target.memory_bytes}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{
  major: 9
  minor: 10
}}
runtime_version {{
  major: 13
}}
device_description_str: "{target.name}"
"""
