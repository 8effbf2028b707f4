"""Where arrays live: a mesh (data, fsdp, tensor) and one table of partition rules.

Rows of a batch are split over data and fsdp. A matrix is split over fsdp along its model dimension
and over tensor along its heads, hidden units or vocabulary. Optimizer state follows its parameter.
"""

import contextlib
import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dslt.core.batch import Batch
from dslt.errors import InputError

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
    """A mesh over `devices` (all by default). Raises InputError where the counts do not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    given = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise InputError(f"{config}: expected positive sizes, and -1 at most once")
    if -1 in sizes and len(devices) % given == 0:
        sizes[sizes.index(-1)] = len(devices) // given
    if math.prod(sizes) != len(devices):
        raise InputError(
            f"{config} asks for {given} devices (times any -1), but there are {len(devices)}; "
            "choose sizes whose product is the device count"
        )
    return Mesh(order_devices(sizes, devices), AXES)


def decoding_mesh(mesh: Mesh, num_heads: int, devices: list[jax.Device] | None = None) -> Mesh:
    """This process's devices alone, as decoding takes them; programs on it need no other process.

    What splits the parameters on `mesh` goes to tensor, as far as these devices go and heads
    divide. A step of decoding has few tokens: over fsdp XLA gathers every matrix for each of them
    (8.5 GB a step and chip for XXL on four), over tensor activations are summed (32 MB).

    Args:
      devices: in place of this process's.
    """
    devices = list(mesh.local_devices) if devices is None else devices
    split = mesh.shape["fsdp"] * mesh.shape["tensor"]
    return make_mesh(MeshConfig(-1, 1, math.gcd(split, len(devices), num_heads)), devices)


def order_devices(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices as an array [data, fsdp, tensor], neighbours along an axis near one another.

    On TPUs near means by the wires of the slice. Several slices (or domains of GPUs) lie along
    data, whose traffic is one sum of gradients a step; what data cannot take lies along fsdp. On
    CPUs the order is that of `devices`.

    Raises:
      InputError: tensor would have to cross slices.
    """
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    data, fsdp, tensor = sizes
    data_slices = math.gcd(data, num_slices)
    fsdp_slices = num_slices // data_slices
    if fsdp % fsdp_slices:
        raise InputError(
            f"data={data}, fsdp={fsdp}, tensor={tensor} would split tensor over {num_slices} "
            f"slices; choose data (or data times fsdp) as a multiple of {num_slices}"
        )
    # Splitting a physical axis changes only meshes that do not exist without it (16x16 chips as
    # 2 x 128); tried on compile-only topologies of every generation.
    if num_slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        (data // data_slices, fsdp // fsdp_slices, tensor),
        (data_slices, fsdp_slices, 1),
        devices,
        allow_split_physical_axes=True,
    )


def batch_spec() -> PartitionSpec:
    """Rows over data and fsdp."""
    return PartitionSpec(("data", "fsdp"))


def larger_axes(mesh, axes: Sequence[str | None]) -> tuple[str | None, ...]:
    """None in place of axes of one device, over which XLA's CPU backend would reduce by a copy."""
    return tuple(axis if axis and mesh.shape[axis] > 1 else None for axis in axes)


def row_axes(mesh) -> tuple[str, ...]:
    """The axes of several devices that rows are split over."""
    return tuple(filter(None, larger_axes(mesh, batch_spec()[0])))


def heads_sharding(mesh: Mesh) -> NamedSharding:
    """Of keys and values [B, H, N, K]: rows over data and fsdp, heads over tensor."""
    return NamedSharding(mesh, PartitionSpec(*batch_spec(), "tensor", None, None))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """`batch_spec` on a mesh; for each array of a Batch."""
    return NamedSharding(mesh, batch_spec())


def local_rows(mesh: Mesh, num_rows: int) -> np.ndarray:
    """[rows] int64, ascending: which of a batch's rows this process's devices hold.

    All of them in a single process. Two processes hold the same rows where the tensor axis crosses
    both, and a process's rows need not lie side by side.
    """
    held = np.zeros(num_rows, bool)
    for (rows,) in batch_sharding(mesh).addressable_devices_indices_map((num_rows,)).values():
        held[rows] = True
    return np.flatnonzero(held)


def put_rows(
    array: np.ndarray, mesh: Mesh, rows: np.ndarray | None = None, num_rows: int | None = None
) -> jax.Array:
    """A global array split over rows; each process gives the rows that its devices hold.

    Args:
      array: the whole array, or this process's part [len(rows), ...] of it.
      rows: ascending row numbers of the part, those of `local_rows` at least.
      num_rows: of the whole array.
    """
    if rows is None:
        rows, num_rows = np.arange(len(array)), len(array)

    def rows_of_device(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(num_rows)
        first = np.searchsorted(rows, start)
        return array[first : first + stop - start]

    shape = (num_rows, *array.shape[1:])
    return jax.make_array_from_callback(shape, batch_sharding(mesh), rows_of_device)


def put_batch(
    batch: Batch, mesh, rows: np.ndarray | None = None, num_rows: int | None = None
) -> Batch:
    """Numpy arrays, whole or of this process's `rows`, to global device arrays of `num_rows`."""
    return Batch(*(put_rows(array, mesh, rows, num_rows) for array in batch))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def inside(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Traced in it, what follows places over this mesh; None does nothing."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if mesh else contextlib.nullcontext()


def split_rows(x: jax.Array) -> jax.Array:
    """Keeps the rows of an activation [B, ...] over data and fsdp; x itself outside of `inside`.

    Without it XLA follows the parameters' split along D instead, computes all rows on every fsdp
    device and sums the partial activations: 6.0 GB a device in place of 2.2 GB for a small T5 with
    64 rows at fsdp=8, and logits of the whole batch on the wire.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*batch_spec(), *others))


def project_split(product, x: jax.Array, matrix: jax.Array, is_split_last: bool) -> jax.Array:
    """`product(x, matrix)` of split rows and a split matrix, said for each device.

    Each gathers the matrix over fsdp for its own rows, and the gradient goes back the same way: one
    reduce-scatter over fsdp, then one sum over data of the part that is kept. Left to itself XLA
    gathered over data too, and summed most gradients whole over both. Where fsdp splits nothing it
    is `product` alone.

    Args:
      product: of [B, N, C] and [C, M] to [B, N, M].
      x: rows are a multiple of `row_multiple`.
      matrix: [D, M] or, where `is_split_last`, [C, D]; the model dimension D is split over fsdp and
        the other one over tensor.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # To decode one position, moving activations is cheaper: XLA may choose.
    if not _splits_parameters(mesh) or x.shape[1] == 1:
        return product(x, matrix)
    axes = ("tensor", "fsdp") if is_split_last else ("fsdp", "tensor")
    where = larger_axes(mesh, _axes_that_fit(mesh, axes, matrix.shape))
    contracted, kept = (where[0], None) if is_split_last else (None, where[1])
    rows = row_axes(mesh)

    def on_device(x, matrix):
        # Of what is whole on several devices the gradient is summed over them, once.
        copies = tuple(axis for axis in rows if axis not in where)
        matrix = jax.lax.pcast(matrix, copies, to="varying")
        x = jax.lax.pcast(x, kept, to="varying") if kept else x
        if "fsdp" in where:
            # TPU compilers form a reduce-scatter along the first dimension alone.
            matrix = matrix.T if is_split_last else matrix
            matrix = jax.lax.all_gather(matrix, "fsdp", tiled=True)
            matrix = matrix.T if is_split_last else matrix
        out = product(x, matrix)
        return jax.lax.psum(out, contracted) if contracted else out

    return jax.shard_map(
        on_device,
        in_specs=(PartitionSpec(rows, None, contracted), PartitionSpec(*where)),
        out_specs=PartitionSpec(rows, None, kept),
    )(x, matrix)


def gather_again(layer, prevent_cse: bool):
    """`layer`, whose backward gathers its matrices again instead of keeping every layer's whole.

    A rematerialised layer does so anyway. Where fsdp splits nothing, it is the layer itself.
    `prevent_cse` is `jax.checkpoint`'s.
    """
    if not _splits_parameters(jax.sharding.get_abstract_mesh()):
        return layer

    def keep(primitive, *_, **__) -> bool:  # everything but the operands that `project_split` makes
        return primitive.name not in ("all_gather", "transpose", "pvary", "reshape")

    return jax.checkpoint(layer, policy=keep, prevent_cse=prevent_cse)


def _splits_parameters(mesh) -> bool:
    return not mesh.empty and mesh.shape["fsdp"] > 1


def row_multiple(mesh: Mesh, accumulation_steps: int = 1) -> int:
    """A batch's rows must be a multiple of this; `batch.pad_rows` makes them so."""
    return mesh.shape["data"] * mesh.shape["fsdp"] * accumulation_steps


def state_shardings(mesh: Mesh, state):
    """A NamedSharding for each leaf of a TrainState (or of parameters alone).

    An optimizer leaf is placed as the parameter of its path and shape; what has another shape
    (Adafactor's factored moments, counters) is replicated.

    Raises:
      InputError: a parameter has no line in PARTITION_RULES.
    """
    params = jax.tree_util.tree_leaves_with_path(getattr(state, "params", state))
    specs = {
        (_names(path), leaf.shape): partition_spec(mesh, *_names(path), shape=leaf.shape)
        for path, leaf in params
    }

    def place(path, leaf):
        names = _names(path)
        for start in range(len(names)):
            if (names[start:], leaf.shape) in specs:
                return NamedSharding(mesh, specs[names[start:], leaf.shape])
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, state)


def with_shardings(mesh: Mesh, abstract):
    """`jax.ShapeDtypeStruct`s of a TrainState (or of parameters alone), each with its sharding."""
    return place_abstract(abstract, state_shardings(mesh, abstract))


def place_abstract(abstract, shardings):
    """`jax.ShapeDtypeStruct`s of a tree of shapes, each with its sharding.

    A sharding may stand for a whole branch of the tree.
    """
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract,
        jax.tree.broadcast(shardings, abstract),
    )


def partition_spec(mesh, *names: str, shape: tuple[int, ...]) -> PartitionSpec:
    """Of the parameter whose path ends in `names`, on a Mesh or an AbstractMesh.

    Raises:
      InputError: it has no line in PARTITION_RULES.
    """
    for suffix, axes in PARTITION_RULES.items():
        if names[-len(suffix) :] == suffix and len(shape) in (len(axes), len(axes) + 1):
            axes = (None,) * (len(shape) - len(axes)) + axes
            return PartitionSpec(*_axes_that_fit(mesh, axes, shape))
    raise InputError(
        f"parameter {'/'.join(names)} of shape {shape} matches no partition rule; add a line to "
        "PARTITION_RULES in dslt/core/sharding.py"
    )


def _axes_that_fit(mesh, axes: Sequence[str | None], shape: Sequence[int]) -> list[str | None]:
    """Drops an axis that does not divide its dimension: small tables stay whole."""
    return [
        axis if axis and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(axes, shape, strict=True)
    ]


def _names(path) -> tuple[str, ...]:
    """The dictionary keys of a tree path: a parameter's name, whatever optax wraps around it."""
    return tuple(part.key for part in path if isinstance(part, jax.tree_util.DictKey))
