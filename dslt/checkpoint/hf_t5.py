"""Hugging Face T5 directories, both ways: safetensors and JSON, without torch or transformers.

May import `core`. Reads what `save_pretrained` of transformers 4 and 5 writes for the model types
t5 (T5, FLAN-T5, ByT5), mt5 and umt5; writes what `from_pretrained` of both reads.

    config, params = load_params("google-t5-small")  # numpy float32, stacked over layers
    save("exported", config, params, "run/vocabulary")

`transformers` 5 looks at the tensors to decide whether the output projection is tied, and forces
`tie_word_embeddings` to true in every config that it writes; so this module looks at them too.
"""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from dslt.checkpoint.hf_config import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    TOKEN_IDS,
    config_fields,
    parse_config,
    write_json,
)
from dslt.checkpoint.hf_tensors import (
    check_sizes,
    check_tensors,
    has_own_lm_head,
    leaf_at,
    open_tensors,
    tensor_specs,
    write_weights,
)
from dslt.checkpoint.hf_tokenizer import write_tokenizer
from dslt.core import t5
from dslt.core.t5 import T5Config
from dslt.errors import InputError
from dslt.files import naming_full_disk


def read_config(directory: str | os.PathLike) -> T5Config:
    """The T5Config of a Hugging Face directory; its run-time fields (`dtype`, …) have defaults.

    The weights are looked at too: a separate `lm_head.weight` makes the projection untied. A umT5
    with a separate head is unscaled where config.json says `tie_word_embeddings: false`, as the
    released ones do; transformers 5 scales its output by D**-0.5 all the same.

    Raises:
      InputError: a file is missing or cannot be read, or the model is no T5 that dslt can run.
    """
    directory = Path(directory)
    return parse_config(directory / CONFIG_FILE, lambda: has_own_lm_head(directory))


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
        stored = open_tensors(directory, stack)
        check_sizes(directory, config, stored)
        specs = tensor_specs(config)
        check_tensors(directory, specs, stored)
        abstract = t5.abstract_params(config)[1]
        params = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), abstract)
        for name, spec in specs.items():
            tensor = stored[name].read()
            target = leaf_at(params, spec.path)
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
    write_more: Callable[[Path], None] = lambda directory: None,
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
      write_more: adds files of the caller's to the directory, before it appears.

    Raises:
      InputError: the directory has files, the vocabulary has none, the config is one that no
        config.json can say, or the disk is full.
    """
    directory, vocabulary_directory = Path(directory).absolute(), Path(vocabulary_directory)
    _check_is_new(directory)
    fields = config_fields(config)
    specs = tensor_specs(config)
    _check_params(config, params)
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    try:
        with naming_full_disk(directory):
            partial.mkdir(parents=True)
            write_json(partial / CONFIG_FILE, fields)
            generation = {**TOKEN_IDS, "max_length": max_target_tokens + 1}  # and the start token
            write_json(partial / GENERATION_CONFIG_FILE, generation)
            write_tokenizer(partial, vocabulary_directory, fields["model_type"])
            write_weights(partial, specs, jax.tree.map(np.asarray, params), max_shard_bytes)
            write_more(partial)
            partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
