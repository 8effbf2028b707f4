"""T5X checkpoints, read only: the released T5 v1.1, FLAN-T5, mT5, ByT5 and umT5, or one's own.

May import `core`. A checkpoint is a directory with `checkpoint`, a msgpack index whose leaves are
small arrays or the names of zarr directories beside it (`target.encoder.layers_0.mlp.wo.kernel`).
Layers lie one by one (`layers_0`) or, scanned, stacked along axis 1. Optimizer state is not read.

    config, params = load_params("t5_1_1_small/checkpoint_1000000")

Source: the layout as t5x/checkpoints.py (google-research/t5x, version 3) writes it; the names as
t5x/examples/t5 and scalable_t5 give them.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorstore
from flax import serialization, traverse_util

from dslt.core import t5
from dslt.core.t5 import T5Config
from dslt.errors import InputError

INDEX_FILE = "checkpoint"
MAX_INDEX_BYTES = 1 << 30
MAX_CHUNK_BYTES = 4 << 30
LAYER_AXIS = 1  # of scanned checkpoints
FLOAT_DTYPES = ("float32", "bfloat16", "float16", "float64")
_MAX_LISTED = 20
_SCANNED = "encoder/encoder/mlp/wo/kernel"  # only scanned checkpoints have it

# Our module names: theirs.
_MODULE_NAMES = {
    "encoder": {
        "self_attention_norm": "pre_attention_layer_norm",
        "self_attention": "attention",
        "feed_forward_norm": "pre_mlp_layer_norm",
        "feed_forward": "mlp",
        "relative_bias": "relpos_bias",
    },
    "decoder": {
        "self_attention_norm": "pre_self_attention_layer_norm",
        "self_attention": "self_attention",
        "cross_attention_norm": "pre_cross_attention_layer_norm",
        "cross_attention": "encoder_decoder_attention",
        "feed_forward_norm": "pre_mlp_layer_norm",
        "feed_forward": "mlp",
        "relative_bias": "relpos_bias",
    },
}


class StoredArray(NamedTuple):
    """A leaf of the index: an array in it, or the name of a zarr directory beside it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    array: np.ndarray | None
    store: object  # tensorstore.TensorStore, or None

    def read(self) -> np.ndarray:
        """float32."""
        if self.array is not None:
            return self.array.astype(np.float32)
        try:
            return self.store.read().result().astype(np.float32)
        except ValueError as error:
            raise InputError(
                f"{self.name}: cannot be read ({_first_line(error)}); fetch the checkpoint again"
            ) from None


class Part(NamedTuple):
    """One array of theirs, or one layer of it, and where it belongs.

    Attributes:
      keys: of the leaf in our params.
      our_layer: index on the leaf's leading axis, or None where it has none.
      shape: of this part of the leaf; where it `is_transposed`, theirs is the reverse.
      name: of their array.
      their_layer: index on its LAYER_AXIS, or None where it has none.
    """

    keys: tuple[str, ...]
    our_layer: int | None
    shape: tuple[int, ...]
    name: str
    their_layer: int | None = None
    is_transposed: bool = False


def load_params(directory: str | os.PathLike) -> tuple[T5Config, dict]:
    """Reads the weights of a T5X checkpoint.

    Returns:
      The config, which the weights' names and shapes tell but for what is the same in every
      released T5 (`relative_attention_max_distance` 128, the norms' epsilon), and the params of its
      T5: nested dicts of numpy float32 arrays.

    Raises:
      InputError: files are missing or broken, a name leads elsewhere, or the arrays are not those
        of a T5: all the missing, unexpected and misshapen ones together.
    """
    directory = Path(directory)
    stored = read_index(directory)
    config = _read_config(directory, stored)
    leaves = traverse_util.flatten_dict(t5.abstract_params(config)[1])
    parts = [part for keys, leaf in leaves.items() for part in _parts(keys, leaf.shape, stored)]
    _check_arrays(directory, parts, stored)
    try:
        arrays = {keys: np.empty(leaf.shape, np.float32) for keys, leaf in leaves.items()}
    except MemoryError as error:
        raise InputError(f"{directory}: does not fit into memory ({error})") from None
    for part in parts:
        array = stored[part.name].read()
        if part.their_layer is not None:
            array = np.take(array, part.their_layer, axis=LAYER_AXIS)
        target = arrays[part.keys][... if part.our_layer is None else part.our_layer]
        target[...] = (array.T if part.is_transposed else array).reshape(target.shape)
    return config, traverse_util.unflatten_dict(arrays)


def read_index(directory: Path) -> dict[str, StoredArray]:
    """The parameters that the index names, such as `encoder/layers_0/mlp/wo/kernel`."""
    path = directory / INDEX_FILE
    try:
        num_bytes = path.stat().st_size
        if num_bytes > MAX_INDEX_BYTES:
            raise InputError(
                f"{path}: has {num_bytes} bytes; expected an index of at most {MAX_INDEX_BYTES}"
            )
        content = serialization.msgpack_restore(path.read_bytes())
        target = content["optimizer"]["target"]
        leaves = traverse_util.flatten_dict(target, is_leaf=lambda _, node: _is_spec(node))
        leaves = {"/".join(keys): leaf for keys, leaf in leaves.items()}
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); expected a T5X checkpoint's directory, "
            "such as checkpoint_1000000"
        ) from None
    except InputError:
        raise
    except Exception as error:  # msgpack and numpy raise many kinds for broken bytes
        raise InputError(
            f"{path}: is no index of a T5X checkpoint ({type(error).__name__}: "
            f"{_first_line(error)}); expected msgpack with optimizer/target"
        ) from None
    return {name: _open(directory, name, leaf) for name, leaf in leaves.items()}


def _is_spec(node) -> bool:
    return isinstance(node, dict) and isinstance(node.get("kvstore"), dict)


def _open(directory: Path, name: str, leaf) -> StoredArray:
    if isinstance(leaf, np.ndarray | np.generic):
        array = np.asarray(leaf)
        return StoredArray(name, array.shape, array.dtype.name, array, None)
    where = leaf["kvstore"].get("path") if _is_spec(leaf) else None
    if not isinstance(where, str) or leaf.get("driver") != "zarr":
        raise InputError(
            f"{directory / INDEX_FILE}: {name} is {_describe(leaf)}; expected an array, or a zarr "
            "store with a path"
        )
    where = where.removesuffix("/")
    path = directory / where
    if where in ("", ".", "..") or Path(where).name != where or path.is_symlink():
        raise InputError(
            f"{directory / INDEX_FILE}: {name} lies at {where[:200]!r}; expected the name of a "
            "directory beside the index"
        )
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(path.absolute())},
        "fill_missing_data_reads": False,  # a missing piece is an error, not zeros
    }
    try:
        store = tensorstore.open(spec, open=True, read=True).result()
    except ValueError as error:
        raise InputError(
            f"{path}: cannot be read as zarr ({_first_line(error)}); fetch the checkpoint again"
        ) from None
    chunk_bytes = math.prod(store.chunk_layout.read_chunk.shape) * store.dtype.numpy_dtype.itemsize
    if chunk_bytes > MAX_CHUNK_BYTES:
        raise InputError(f"{path}: has chunks of {chunk_bytes} bytes; {MAX_CHUNK_BYTES} at most")
    return StoredArray(name, tuple(store.shape), store.dtype.name, None, store)


def _read_config(directory: Path, stored: dict[str, StoredArray]) -> T5Config:
    """The config by the weights' names and shapes."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in stored or len(stored[name].shape) != rank or 0 in stored[name].shape:
            found = list(stored[name].shape) if name in stored else "none"
            raise InputError(
                f"{directory}: is no T5 that dslt can run: found {found} as {name}, expected an "
                f"array of {rank} dimensions. Found {sorted(stored)[:_MAX_LISTED]}"
            )
        return stored[name].shape

    is_scanned = _SCANNED in stored
    first = "encoder/encoder" if is_scanned else "encoder/layers_0"
    vocab_size, d_model = shape("token_embedder/embedding", 2)
    d_ff = shape(f"{first}/mlp/wo/kernel", 3 if is_scanned else 2)[0]
    shared = "encoder/relpos_bias/rel_embedding"
    per_layer = f"{first}/relpos_bias/rel_embedding"
    if shared in stored:
        num_heads, num_buckets = shape(shared, 2)
    elif is_scanned:
        num_heads, _, num_buckets = shape(per_layer, 3)
    else:
        num_heads, num_buckets = shape(per_layer, 2)
    out_name = f"{first}/attention/out/kernel"
    out_shape = stored[out_name].shape if out_name in stored else ()
    joined = math.prod(out_shape[:1] + out_shape[1 + is_scanned : -1])  # heads times head size
    if is_scanned:
        num_layers = shape(f"{first}/mlp/wo/kernel", 3)[LAYER_AXIS]
        num_decoder_layers = shape("decoder/decoder/mlp/wo/kernel", 3)[LAYER_AXIS]
    else:
        num_layers, num_decoder_layers = (_count_layers(stored, s) for s in ("encoder", "decoder"))
    has_head = "decoder/logits_dense/kernel" in stored
    is_gated = f"{first}/mlp/wi_0/kernel" in stored
    # A scanned model that shares its table has it once all the same: on an axis of one layer.
    is_shared = shared in stored or (is_scanned and stored[per_layer].shape[LAYER_AXIS] == 1)
    try:
        return T5Config(
            vocab_size=vocab_size,
            d_model=d_model,
            d_kv=joined // num_heads,
            d_ff=d_ff,
            num_heads=num_heads,
            num_layers=num_layers,
            num_decoder_layers=num_decoder_layers,
            relative_attention_num_buckets=num_buckets,
            feed_forward_proj="gated-gelu" if is_gated else "relu",
            tie_word_embeddings=not has_head,
            scale_decoder_outputs=not has_head,
            relative_bias_per_layer=not is_shared,
        )
    except ValueError as error:
        raise InputError(f"{directory}: is no T5 that dslt can run: {error}") from None


def _count_layers(stored: dict[str, StoredArray], stack: str) -> int:
    return len({name.split("/")[1] for name in stored if name.startswith(f"{stack}/layers_")})


def _parts(keys: tuple[str, ...], shape: tuple[int, ...], stored: dict) -> Iterator[Part]:
    """What the leaf `keys` of our params is made of."""
    if len(keys) == 1:
        own = {"token_embedding": "token_embedder/embedding"}
        yield Part(keys, None, shape, own.get(keys[0], "decoder/logits_dense/kernel"))
        return
    stack, *inside, param = keys
    if inside == ["final_norm"]:
        yield Part(keys, None, shape, f"{stack}/{stack}_norm/scale")
    elif inside == ["relative_bias"]:
        scanned = f"{stack}/{stack}/relpos_bias/rel_embedding"
        name = scanned if scanned in stored else f"{stack}/relpos_bias/rel_embedding"
        yield Part(keys, None, shape, name, 0 if name == scanned else None, is_transposed=True)
    else:
        module = inside[-1]
        last = {"scale": "scale", "embedding": "rel_embedding"}.get(param, f"{param}/kernel")
        name = f"{_MODULE_NAMES[stack][module]}/{last}"
        is_scanned = _SCANNED in stored
        for layer in range(shape[0]):
            place = stack if is_scanned else f"layers_{layer}"
            yield Part(
                keys,
                layer,
                shape[1:],
                f"{stack}/{place}/{name}",
                layer if is_scanned else None,
                is_transposed=module == "relative_bias",
            )


def _check_arrays(directory: Path, parts: list[Part], stored: dict[str, StoredArray]) -> None:
    """Raises InputError unless the checkpoint holds exactly the arrays of `parts`, as floats."""
    num_layers: dict[str, int] = {}
    for part in parts:
        num_layers[part.name] = 1 + (part.their_layer or 0)
    faults = {}
    for part in parts:
        if part.name not in stored:
            faults[part.name] = f"missing {part.name}"
            continue
        found = stored[part.name].shape
        own = found
        if part.their_layer is not None:
            own = found[:LAYER_AXIS] + found[LAYER_AXIS + 1 :]
        is_whole = own == found or found[LAYER_AXIS] == num_layers[part.name]
        expected = part.shape[::-1] if part.is_transposed else part.shape
        if not _fits(own, expected) or not is_whole:
            layers = f", {num_layers[part.name]} layers on axis {LAYER_AXIS}" * (own != found)
            faults[part.name] = (
                f"{part.name}: found {list(found)}, expected {list(expected)}{layers}"
            )
        elif stored[part.name].dtype not in FLOAT_DTYPES:
            faults[part.name] = f"{part.name}: found {stored[part.name].dtype}, expected a float"
    for name in sorted(stored.keys() - num_layers.keys()):
        faults[name] = f"unexpected {name} {list(stored[name].shape)}"
    if faults:
        listed = list(faults.values())
        more = [f"… and {len(listed) - _MAX_LISTED} more"] if len(listed) > _MAX_LISTED else []
        raise InputError(
            f"{directory}: is no T5 that dslt can run ({len(stored)} arrays found, "
            f"{len(num_layers)} expected):\n  " + "\n  ".join(listed[:_MAX_LISTED] + more)
        )


def _fits(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether the shapes are equal, or are where heads and head size are joined to one axis."""
    joined = {expected}
    if len(expected) == 3:  # [D, H, K] or [H, K, D]
        first, middle, last = expected
        joined |= {(first, middle * last), (first * middle, last)}
    return found in joined


def _describe(leaf) -> str:
    return f"a {type(leaf).__name__}" + (
        f" with {sorted(leaf)[:5]}" if isinstance(leaf, dict) else ""
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]
