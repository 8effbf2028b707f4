"""Hugging Face T5 directories, both ways: safetensors and JSON, without torch or transformers.

May import `core`. Reads what `save_pretrained` of transformers 4 and 5 writes for the model types
t5 (T5, FLAN-T5, ByT5), mt5 and umt5; writes what `from_pretrained` of both reads.

    config, params = load_params("google-t5-small")  # numpy float32, stacked over layers
    save("exported", config, params, "run/vocabulary")

`transformers` 5 looks at the tensors to decide whether the output projection is tied, and forces
`tie_word_embeddings` to true in every config that it writes; so this module looks at them too.
"""

import contextlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy

from dslt import strict_json
from dslt.core import t5
from dslt.core.batch import EOS_ID, PAD_ID
from dslt.core.t5 import T5Config
from dslt.errors import InputError

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

MODEL_TYPES = ("t5", "mt5", "umt5")
_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_MAX_LISTED = 20

_REQUIRED_FIELDS = ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers")
_OPTIONAL_FIELDS = {  # old files leave them out; the values are those of transformers
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
}
_TOKEN_IDS = {"pad_token_id": PAD_ID, "eos_token_id": EOS_ID, "decoder_start_token_id": PAD_ID}
_ACTIVATIONS = {"relu": "relu", "gated-gelu": "gelu_new"}  # feed_forward_proj: dense_act_fn

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


def read_config(directory: str | os.PathLike) -> T5Config:
    """The T5Config of a Hugging Face directory; its run-time fields (`dtype`, …) have defaults.

    The weights are looked at too: a separate `lm_head.weight` makes the projection untied. A umT5
    with a separate head is unscaled where config.json says `tie_word_embeddings: false`, as the
    released ones do; transformers 5 scales its output by D**-0.5 all the same.

    Raises:
      InputError: a file is missing or cannot be read, or the model is no T5 that dslt can run.
    """
    directory = Path(directory)
    path = directory / CONFIG_FILE
    fields = {name: value for name, value in _read_json(path).items() if value is not None}
    _check_is_t5(path, fields)
    model_type = fields["model_type"]
    is_untied_by_name = fields.get("tie_word_embeddings") is False
    is_scaled = model_type != "mt5" and not is_untied_by_name
    if model_type == "t5" and "scale_decoder_outputs" in fields:
        is_scaled = bool(fields["scale_decoder_outputs"])
    try:
        return T5Config(
            **{name: fields[name] for name in _REQUIRED_FIELDS},
            **{name: fields.get(name, value) for name, value in _OPTIONAL_FIELDS.items()},
            num_decoder_layers=fields.get("num_decoder_layers") or fields["num_layers"],
            feed_forward_proj=_feed_forward_proj(fields),
            tie_word_embeddings=not is_untied_by_name and not _has_own_lm_head(directory),
            scale_decoder_outputs=is_scaled,
            relative_bias_per_layer=model_type == "umt5",
        )
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def load_params(
    directory: str | os.PathLike, config: T5Config | None = None
) -> tuple[T5Config, dict]:
    """Reads the weights of a Hugging Face directory.

    Args:
      directory: with config.json and model.safetensors, or its shards and their index.
      config: what the weights must fit; None reads it from the directory.

    Returns:
      The config and the params of its T5: nested dicts of numpy float32 arrays. float16 and
      bfloat16 files are widened.

    Raises:
      InputError: files are missing, truncated or pickles, or the tensors are not those of the
        config: all the missing, unexpected and misshapen ones together.
    """
    directory = Path(directory)
    config = config or read_config(directory)
    with contextlib.ExitStack() as stack:
        stored = _open_tensors(directory, stack)
        _check_sizes(directory, config, stored)
        specs = tensor_specs(config)
        _check_tensors(directory, specs, stored)
        abstract = t5.abstract_params(config)[1]
        params = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), abstract)
        for name, spec in specs.items():
            tensor = stored[name].read()
            target = _leaf(params, spec.path)
            target = target if spec.layer is None else target[spec.layer]
            target[...] = (tensor.T if spec.is_projection else tensor).reshape(target.shape)
    return config, params


def save(
    directory: str | os.PathLike,
    config: T5Config,
    params: dict,
    vocabulary_directory: str | os.PathLike,
    *,
    max_target_tokens: int = 256,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a directory that `AutoModelForSeq2SeqLM` and `AutoTokenizer` load.

    It appears whole or not at all. A model with a bias table a layer becomes a `umt5`, every other
    one a `t5`: mT5 computes the same under either name.

    Args:
      directory: must not exist, or be empty.
      params: of the T5 of `config`; arrays of any float dtype, written as float32.
      vocabulary_directory: what `Vocabulary.save` or `save_pretrained` of a tokenizer wrote.
      max_target_tokens: `generate` stops there unless told otherwise; its own default is 20.
      max_shard_bytes: weights above it go into several files with an index.

    Raises:
      InputError: the directory has files, the vocabulary has none, or the config is one that no
        config.json can say.
    """
    directory, vocabulary_directory = Path(directory).absolute(), Path(vocabulary_directory)
    _check_is_new(directory)
    fields = config_fields(config)
    specs = tensor_specs(config)
    _check_params(config, params)
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        _write_json(partial / CONFIG_FILE, fields)
        generation = {**_TOKEN_IDS, "max_length": max_target_tokens + 1}  # and the start token
        _write_json(partial / GENERATION_CONFIG_FILE, generation)
        _write_tokenizer(partial, vocabulary_directory, fields["model_type"])
        _write_weights(partial, specs, jax.tree.map(np.asarray, params), max_shard_bytes)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def config_fields(config: T5Config) -> dict:
    """The content of config.json for a T5Config.

    transformers 4 knows only scaled tied and unscaled untied outputs; the other two are said in the
    way of transformers 5, by `scale_decoder_outputs`.

    Raises:
      InputError: for a umT5 with a tied, unscaled output, which transformers always scales.
    """
    is_umt5 = config.relative_bias_per_layer
    is_tied = config.tie_word_embeddings
    if is_umt5 and is_tied and not config.scale_decoder_outputs:
        raise InputError(
            "a T5Config with relative_bias_per_layer, tie_word_embeddings and without "
            "scale_decoder_outputs has no Hugging Face form: found a tied umT5 that does not scale "
            "its output, expected one that does, as transformers' always do. Train it with "
            "T5Config.scale_decoder_outputs = True or T5Config.tie_word_embeddings = False"
        )
    names = (*_REQUIRED_FIELDS, "num_decoder_layers", *_OPTIONAL_FIELDS, "feed_forward_proj")
    fields = {
        "architectures": [
            "UMT5ForConditionalGeneration" if is_umt5 else "T5ForConditionalGeneration"
        ],
        "model_type": "umt5" if is_umt5 else "t5",
        **{name: getattr(config, name) for name in names},
        "is_gated_act": config.feed_forward_proj.startswith("gated-"),
        "dense_act_fn": _ACTIVATIONS[config.feed_forward_proj],
        "is_encoder_decoder": True,
        "use_cache": True,
        "tie_word_embeddings": is_tied,
        **_TOKEN_IDS,
    }
    if is_umt5:  # its scale follows `tie_word_embeddings`, and the tying the tensors
        fields["tie_word_embeddings"] = config.scale_decoder_outputs
    else:
        fields["scale_decoder_outputs"] = config.scale_decoder_outputs
    return fields


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


def _leaf(params: dict, path: tuple[str, ...]):
    for key in path:
        params = params[key]
    return params


def _check_is_t5(path: Path, fields: dict) -> None:
    """Raises InputError with all that keeps config.json from being a T5 that dslt can run."""
    found_type = fields.get("model_type")
    if found_type not in MODEL_TYPES:
        raise InputError(
            f"{path}: model_type is {found_type!r}; expected one of {', '.join(MODEL_TYPES)}"
        )
    faults = [f"field {name!r} is missing" for name in _REQUIRED_FIELDS if name not in fields]
    for name in (*_REQUIRED_FIELDS, "num_decoder_layers", *_OPTIONAL_FIELDS):
        value = fields.get(name)
        is_float = name in ("dropout_rate", "layer_norm_epsilon")
        allowed = (int, float) if is_float else (int,)
        in_range = type(value) in allowed and (0 <= value < 1 if is_float else 0 < value < 2**31)
        if value is not None and not in_range:
            kind = "a number from 0 to 1" if is_float else "a positive integer"
            faults.append(f"field {name!r} is {value!r}; expected {kind}")
    proj = _feed_forward_proj(fields)
    if not isinstance(proj, str) or proj not in _ACTIVATIONS:
        faults.append(f"feed_forward_proj is {proj!r}; expected {' or '.join(_ACTIVATIONS)}")
    elif fields.get("dense_act_fn") not in (None, _ACTIVATIONS[proj]):
        faults.append(
            f"dense_act_fn is {fields['dense_act_fn']!r}; expected {_ACTIVATIONS[proj]!r} with "
            f"feed_forward_proj {proj!r}"
        )
    for name, expected in _TOKEN_IDS.items():
        if fields.get(name, expected) != expected:
            faults.append(f"{name} is {fields[name]!r}; expected {expected}, as every T5 has it")
    if faults:
        raise InputError(f"{path}: is no T5 that dslt can run:\n  " + "\n  ".join(faults))


def _feed_forward_proj(fields: dict) -> str:
    return fields.get("feed_forward_proj", "relu" if fields["model_type"] == "t5" else "gated-gelu")


def _has_own_lm_head(directory: Path) -> bool:
    """Whether the files have an output projection that differs from the embedding."""
    with contextlib.ExitStack() as stack:
        stored = _open_tensors(directory, stack)
        return _LM_HEAD_NAME in stored and not _is_embedding(stored, _LM_HEAD_NAME)


def _open_tensors(directory: Path, stack: contextlib.ExitStack) -> dict[str, StoredTensor]:
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
    file_names = _read_json(index).get("weight_map")
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


def _check_sizes(directory: Path, config: T5Config, stored: dict[str, StoredTensor]) -> None:
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


def _check_tensors(
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


def _check_is_new(directory: Path) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(
            f"{directory}: exists and is not empty; expected a new directory. Name another one, or "
            "move this one away"
        )


def _check_params(config: T5Config, params: dict) -> None:
    found = jax.tree.map(lambda leaf: tuple(leaf.shape), params)
    expected = jax.tree.map(lambda leaf: leaf.shape, t5.abstract_params(config)[1])
    if found != expected:
        raise ValueError(f"params are not those of the config: found {found}, expected {expected}")


def _write_weights(
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
        _write_json(directory / INDEX_FILE, index)


def file_tensor(params: dict, spec: TensorSpec) -> np.ndarray:
    """The tensor of `spec` as a file has it, float32, from numpy arrays in a tree like params."""
    leaf = _leaf(params, spec.path)
    array = leaf if spec.layer is None else leaf[spec.layer]
    array = array.astype(np.float32, copy=False)
    array = array.reshape(spec.shape[::-1]).T if spec.is_projection else array
    return np.ascontiguousarray(array)


def _write_tokenizer(directory: Path, source: Path, model_type: str) -> None:
    """Copies a vocabulary's files and adds what `AutoTokenizer` needs besides.

    transformers 5 rebuilds a T5Tokenizer's normaliser by its own rules when it reads a
    tokenizer.json, so a bare one is given the class that takes it as it is; and it does not read
    the spiece.model of a umT5.
    """
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not {"spiece.model", "tokenizer.json", "tokenizer_config.json"} & set(names):
        raise InputError(
            f"{source}: has no vocabulary; expected spiece.model, tokenizer.json or a "
            "tokenizer_config.json of ByT5"
        )
    for name in names:
        shutil.copyfile(source / name, directory / name)
    if model_type == "umt5" and "spiece.model" in names and "tokenizer.json" not in names:
        _write_tokenizer_json(directory / "spiece.model", directory / "tokenizer.json")
    if "tokenizer_config.json" not in names:
        is_fast = (directory / "tokenizer.json").is_file()
        fields = {
            "tokenizer_class": "PreTrainedTokenizerFast" if is_fast else "T5Tokenizer",
            **({} if is_fast else {"extra_ids": 100}),
            "model_input_names": ["input_ids", "attention_mask"],  # no token_type_ids
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
        }
        _write_json(directory / "tokenizer_config.json", fields)


def _write_tokenizer_json(spiece_path: Path, path: Path) -> None:
    """The tokenizer.json of T5's SentencePiece models: unigram pieces and 100 sentinels."""
    from sentencepiece import sentencepiece_model_pb2  # protobuf: only umT5 exports need it
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    model = sentencepiece_model_pb2.ModelProto.FromString(spiece_path.read_bytes())
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(100))]
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    unk_id = model.trainer_spec.unk_id
    vocab = pieces + [(sentinel, 0.0) for sentinel in sentinels]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=unk_id, byte_fallback=False))
    if model.normalizer_spec.precompiled_charsmap:
        tokenizer.normalizer = normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
    metaspace = {"replacement": "▁", "prepend_scheme": "always"}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**metaspace)]
    )
    tokenizer.decoder = decoders.Metaspace(**metaspace)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS_ID)]
    )
    tokenizer.add_special_tokens([pieces[id_][0] for id_ in (PAD_ID, EOS_ID, unk_id)] + sentinels)
    tokenizer.save(str(path))


def _read_json(path: Path) -> dict:
    try:
        content = strict_json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); expected that of a Hugging Face model"
        ) from None
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: found a JSON {type(content).__name__}; expected an object")
    return content


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
