"""The tensors of a Hugging Face T5: their names and shapes, and the safetensors files they lie in.

May import `core`. A directory has one file, or shards and an index of them.

    specs = tensor_specs(config)  # name in the file → where it belongs in our params
    with contextlib.ExitStack() as stack:
        stored = open_tensors(Path("flan-t5-small"), stack)
        array = stored["shared.weight"].read()
"""

import contextlib
import math
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy

from dslt.checkpoint.hf_config import read_json, write_json
from dslt.core import t5
from dslt.core.t5 import T5Config
from dslt.errors import InputError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_MAX_LISTED = 20

# Our module and parameter names: theirs, under `<stack>.block.<layer>.`
_MODULE_NAMES = {
    "encoder": {
        "self_attention_norm": "layer.0.layer_norm",
        "self_attention": "layer.0.SelfAttention",
        "relative_bias": "layer.0.SelfAttention.relative_attention_bias",
        "feed_forward_norm": "layer.1.layer_norm",
        "feed_forward": "layer.1.DenseReluDense",
    },
    "decoder": {
        "self_attention_norm": "layer.0.layer_norm",
        "self_attention": "layer.0.SelfAttention",
        "relative_bias": "layer.0.SelfAttention.relative_attention_bias",
        "cross_attention_norm": "layer.1.layer_norm",
        "cross_attention": "layer.1.EncDecAttention",
        "feed_forward_norm": "layer.2.layer_norm",
        "feed_forward": "layer.2.DenseReluDense",
    },
}
_PARAM_NAMES = {
    "query": "q.weight",
    "key": "k.weight",
    "value": "v.weight",
    "out": "o.weight",
    "wi": "wi.weight",
    "wi_0": "wi_0.weight",
    "wi_1": "wi_1.weight",
    "wo": "wo.weight",
    "scale": "weight",
    "embedding": "weight",
}
_EMBEDDING_NAME = "shared.weight"
_LM_HEAD_NAME = "lm_head.weight"
_EMBEDDING_ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# The released T5 v1.0 files have this table; no version of the model reads it.
_UNUSED_NAMES = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)


class StoredTensor(NamedTuple):
    """One tensor of an open safetensors file."""

    file: object  # safetensors.safe_open
    name: str  # in the file

    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    def dtype(self) -> str:
        return self.file.get_slice(self.name).get_dtype()

    def read(self) -> np.ndarray:
        return self.file.get_tensor(self.name)


class TensorSpec(NamedTuple):
    """Where one tensor of a Hugging Face file belongs.

    Attributes:
      path: of the leaf in our params.
      layer: index on the leaf's leading axis, or None where the leaf has none.
      shape: in the file. A projection is [out, in] there and [in, ...] or [..., out] here.
      is_projection: whether it is transposed; embeddings, bias tables and scales are not.
    """

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]
    is_projection: bool


def tensor_specs(config: T5Config) -> dict[str, TensorSpec]:
    """Name in the file to TensorSpec, for each tensor of a T5 of this config."""
    specs = {}
    leaves = jax.tree.leaves_with_path(t5.abstract_params(config)[1])
    for key_path, leaf in leaves:
        path = tuple(key.key for key in key_path)
        if "layers" in path:
            for layer in range(leaf.shape[0]):
                specs[_layer_tensor_name(path, layer)] = _spec(path, layer, leaf.shape[1:])
        else:
            specs[_shared_tensor_name(path)] = _spec(path, None, leaf.shape)
    return specs


def _layer_tensor_name(path: tuple[str, ...], layer: int) -> str:
    stack, _, module, param = path
    return f"{stack}.block.{layer}.{_MODULE_NAMES[stack][module]}.{_PARAM_NAMES[param]}"


def _shared_tensor_name(path: tuple[str, ...]) -> str:
    if len(path) == 1:
        return {"token_embedding": _EMBEDDING_NAME, "lm_head": _LM_HEAD_NAME}[path[0]]
    stack, module, param = path
    if module == "final_norm":
        return f"{stack}.final_layer_norm.weight"
    return _layer_tensor_name((stack, "layers", module, param), 0)  # the first block owns it


def _spec(path: tuple[str, ...], layer: int | None, shape: tuple[int, ...]) -> TensorSpec:
    is_projection = path[-1] not in ("scale", "embedding", "token_embedding")
    if is_projection:
        num_out = shape[-1] if path[-1] == "out" else math.prod(shape[1:])
        shape = (num_out, math.prod(shape) // num_out)
    return TensorSpec(path, layer, shape, is_projection)


def leaf_at(params: dict, path: tuple[str, ...]):
    """The leaf, or what tree there is, at a path of names."""
    for key in path:
        params = params[key]
    return params


def open_tensors(directory: Path, stack: contextlib.ExitStack) -> dict[str, StoredTensor]:
    """The tensors of a directory by name. An embedding under another of its names gets its own."""
    single, index = directory / WEIGHTS_FILE, directory / INDEX_FILE
    if single.is_file():
        file = stack.enter_context(_open_safetensors(single))
        stored = {name: StoredTensor(file, name) for name in file.keys()}  # noqa: SIM118
    elif index.is_file():
        stored = _open_shards(index, stack)
    else:
        _raise_without_weights(directory)
    for alias in _EMBEDDING_ALIASES:
        if alias in stored:
            stored.setdefault(_EMBEDDING_NAME, stored[alias])
    return stored


def _open_shards(index: Path, stack: contextlib.ExitStack) -> dict[str, StoredTensor]:
    file_names = read_json(index).get("weight_map")
    if not isinstance(file_names, dict) or not all(
        isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name
        for name in file_names.values()
    ):
        raise InputError(f"{index}: has no weight_map of tensor names to names of files beside it")
    files = {
        name: stack.enter_context(_open_safetensors(index.with_name(name)))
        for name in sorted(set(file_names.values()))
    }
    tensor_names = {name: set(file.keys()) for name, file in files.items()}
    for tensor_name, file_name in file_names.items():
        if tensor_name not in tensor_names[file_name]:
            raise InputError(
                f"{index.with_name(file_name)}: has no tensor {tensor_name!r}; expected it there "
                f"by {index.name}. Fetch the model again"
            )
    return {
        tensor_name: StoredTensor(files[file_name], tensor_name)
        for tensor_name, file_name in file_names.items()
    }


def _open_safetensors(path: Path):
    try:
        return safetensors.safe_open(path, framework="numpy")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error}); expected safetensors weights"
        ) from None
    except safetensors.SafetensorError as error:
        raise InputError(
            f"{path}: found {path.stat().st_size} bytes that are no whole safetensors file "
            f"({error}); fetch it again"
        ) from None


def _raise_without_weights(directory: Path) -> None:
    found = sorted(path.name for path in directory.glob("*"))[:_MAX_LISTED]
    pickles = [name for name in found if name.endswith(".bin")]
    message = f"{directory}: has no {WEIGHTS_FILE} and no {INDEX_FILE}; found {found or 'nothing'}"
    if pickles:
        message += (
            f". {pickles[0]} is a pickle, which may run code when it is read and is refused; where "
            'torch is installed, convert it: python -c "from transformers import '
            "AutoModelForSeq2SeqLM as M; M.from_pretrained('FROM').save_pretrained('TO')\""
        )
    raise InputError(message)


def has_own_lm_head(directory: Path) -> bool:
    """Whether the files have an output projection that differs from the embedding."""
    with contextlib.ExitStack() as stack:
        stored = open_tensors(directory, stack)
        return _LM_HEAD_NAME in stored and not _is_embedding(stored, _LM_HEAD_NAME)


def check_sizes(directory: Path, config: T5Config, stored: dict[str, StoredTensor]) -> None:
    """Raises InputError where the config declares more than the files could hold.

    So that a forged config.json takes no memory: nothing of its sizes is built before.
    """
    num_values = sum(math.prod(tensor.shape()) for tensor in stored.values())
    declared = {
        "num_layers": (config.num_layers, len(stored)),
        "num_decoder_layers": (config.num_decoder_layers, len(stored)),
        "vocab_size * d_model": (config.vocab_size * config.d_model, num_values),
        "d_model * d_ff": (config.d_model * config.d_ff, num_values),
        "d_model * num_heads * d_kv": (config.d_model * config.num_heads * config.d_kv, num_values),
        "relative_attention_num_buckets * num_heads": (
            config.relative_attention_num_buckets * config.num_heads,
            num_values,
        ),
    }
    faults = [f"{name} is {size:,}" for name, (size, most) in declared.items() if size > most]
    if faults:
        raise InputError(
            f"{directory}: the config asks for more than the weights hold ({len(stored)} tensors "
            f"of {num_values:,} numbers together): {', '.join(faults)}"
        )


def check_tensors(
    directory: Path, specs: dict[str, TensorSpec], stored: dict[str, StoredTensor]
) -> None:
    """Raises InputError unless the files hold exactly the tensors of `specs`, as floats."""
    faults = [f"missing {name} {list(specs[name].shape)}" for name in specs if name not in stored]
    for name in sorted(stored):
        shape, dtype = stored[name].shape(), stored[name].dtype()
        if name in specs:
            if shape != specs[name].shape:
                faults.append(f"{name}: found {list(shape)}, expected {list(specs[name].shape)}")
            elif dtype not in _FLOAT_DTYPES:
                faults.append(f"{name}: found dtype {dtype}, expected a float")
        elif name in (*_EMBEDDING_ALIASES, _LM_HEAD_NAME):
            if not _is_embedding(stored, name):
                faults.append(f"{name}: differs from {_EMBEDDING_NAME}; expected a copy of it")
        elif name not in _UNUSED_NAMES:
            faults.append(f"unexpected {name} {list(shape)}")
    if faults:
        more = [f"… and {len(faults) - _MAX_LISTED} more"] if len(faults) > _MAX_LISTED else []
        raise InputError(
            f"{directory}: the weights are not those of the config ({len(stored)} tensors found, "
            f"{len(specs)} expected):\n  " + "\n  ".join(faults[:_MAX_LISTED] + more)
        )


def _is_embedding(stored: dict[str, StoredTensor], name: str) -> bool:
    """Whether the tensor `name` is a copy of the embedding."""
    return _EMBEDDING_NAME in stored and np.array_equal(
        stored[name].read(), stored[_EMBEDDING_NAME].read()
    )


def write_weights(
    directory: Path, specs: dict[str, TensorSpec], params: dict, max_shard_bytes: int
) -> None:
    """Writes model.safetensors, or shards with an index; holds one shard's copy at a time."""
    shards, shard_bytes, total_bytes = [[]], 0, 0
    for name, spec in specs.items():
        num_bytes = 4 * math.prod(spec.shape)
        if shards[-1] and shard_bytes + num_bytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += num_bytes
        total_bytes += num_bytes
    file_names = [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    if len(shards) == 1:
        file_names = [WEIGHTS_FILE]
    for file_name, names in zip(file_names, shards, strict=True):
        tensors = {name: file_tensor(params, specs[name]) for name in names}
        safetensors.numpy.save_file(tensors, directory / file_name, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {
            name: file_name
            for file_name, names in zip(file_names, shards, strict=True)
            for name in names
        }
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_json(directory / INDEX_FILE, index)


def file_tensor(params: dict, spec: TensorSpec) -> np.ndarray:
    """The tensor of `spec` as a file has it, float32, from numpy arrays in a tree like params."""
    leaf = leaf_at(params, spec.path)
    array = leaf if spec.layer is None else leaf[spec.layer]
    array = array.astype(np.float32, copy=False)
    array = array.reshape(spec.shape[::-1]).T if spec.is_projection else array
    return np.ascontiguousarray(array)
