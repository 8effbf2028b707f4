"""Where arrays live: a mesh (data, fsdp, tensor) and one table of partition rules.

Rows of a batch are split over data and fsdp. A matrix is split over fsdp along its model dimension
and over tensor along its heads, hidden units or vocabulary. Optimizer state follows its parameter.
"""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# The last parts of a parameter's path -> the axes of its trailing dimensions. A leading layer axis
# is never split. Kept in one place: adding a parameter to t5.py means adding a line here.
PARTITION_RULES = {
    ("token_embedding",): ("tensor", "fsdp"),  # V, D
    ("lm_head",): ("fsdp", "tensor"),  # D, V
    ("query",): ("fsdp", "tensor", None),  # D, H, K
    ("key",): ("fsdp", "tensor", None),
    ("value",): ("fsdp", "tensor", None),
    ("out",): ("tensor", None, "fsdp"),  # H, K, D
    ("wi",): ("fsdp", "tensor"),  # D, F
    ("wi_0",): ("fsdp", "tensor"),
    ("wi_1",): ("fsdp", "tensor"),
    ("wo",): ("tensor", "fsdp"),  # F, D
    ("relative_bias", "embedding"): (None, "tensor"),  # buckets, H
    ("scale",): (None,),  # D
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices an axis; at most one axis may be -1: all that remain.

    Attributes:
      data: copies of the model, each with its own rows.
      fsdp: parameters and optimizer state are split over these devices, and so are the rows.
      tensor: heads, hidden units and vocabulary are split over these devices.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (all by default). Raises ValueError where the counts do not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    given = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise ValueError(f"{config}: expected positive sizes, and -1 at most once")
    if -1 in sizes and len(devices) % given == 0:
        sizes[sizes.index(-1)] = len(devices) // given
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"{config} asks for {given} devices (times any -1), but there are {len(devices)}; "
            "choose sizes whose product is the device count"
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp; for each array of a Batch."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def row_multiple(mesh: Mesh, accumulation_steps: int = 1) -> int:
    """A batch's rows must be a multiple of this; `batch.pad_rows` makes them so."""
    return mesh.shape["data"] * mesh.shape["fsdp"] * accumulation_steps


def state_shardings(mesh: Mesh, state):
    """A NamedSharding for each leaf of a TrainState (or of parameters alone).

    Optimizer leaves are found by the path of the parameter that they belong to; what has another
    shape (Adafactor's factored moments, counters) is replicated.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _partition(mesh, path, leaf.shape)), state
    )


def _partition(mesh: Mesh, path, shape: tuple[int, ...]) -> PartitionSpec:
    names = tuple(part.key for part in path if isinstance(part, jax.tree_util.DictKey))
    for suffix, axes in PARTITION_RULES.items():
        if names[-len(suffix) :] == suffix and len(shape) in (len(axes), len(axes) + 1):
            axes = (None,) * (len(shape) - len(axes)) + axes
            # An axis that does not divide its dimension is dropped: small tables stay whole.
            fits = (
                axis if axis and dim % mesh.shape[axis] == 0 else None
                for axis, dim in zip(axes, shape, strict=True)
            )
            return PartitionSpec(*fits)
    return PartitionSpec()
