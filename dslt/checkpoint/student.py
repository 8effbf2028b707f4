"""A student wherever it lies: a run, one of its checkpoints, or a Hugging Face directory."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from dslt.checkpoint import hf_t5
from dslt.checkpoint.manager import CheckpointManager
from dslt.core import attention, sharding, t5
from dslt.core.t5 import T5Config
from dslt.errors import InputError

# Fields of T5Config that change how a model runs, not what its parameters are.
_RUNTIME_FIELDS = (
    "dropout_rate", "dtype", "remat", "scan_unroll", "attention", "attention_dropout_rate",
)  # fmt: skip


def read_config(path: Path) -> T5Config:
    """The config of the student in `path` (see `find_checkpoint`)."""
    if is_hugging_face(path):
        return hf_t5.read_config(path)
    directory, step = find_checkpoint(path)
    with CheckpointManager(directory, read_only=True) as manager:
        return manager.layout(step).model


def read_params(path: Path, config: T5Config, abstract_params: dict) -> dict:
    """The parameters in `path`, placed by the shardings of `abstract_params`.

    Raises:
      InputError: where they belong to another model than `config`, with both sides.
    """
    if is_hugging_face(path):
        found_config, params = hf_t5.load_params(path)
        _check_same_model(path, found_config, config)
        return jax.tree.map(_place, params, abstract_params)
    directory, step = find_checkpoint(path)
    with CheckpointManager(directory, read_only=True) as manager:
        _check_same_model(directory / str(step), manager.layout(step).model, config)
        return manager.restore_params(step, abstract_params)


def _place(array: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Puts the array where `like` is to be; each process sends what its own devices hold."""
    return jax.make_array_from_callback(array.shape, like.sharding, lambda index: array[index])


def _check_same_model(path: Path, found: T5Config, expected: T5Config) -> None:
    found_fields, expected_fields = dataclasses.asdict(found), dataclasses.asdict(expected)
    differing = [
        f"{name}: found {found_fields[name]}, expected {expected_fields[name]}"
        for name in found_fields
        if name not in _RUNTIME_FIELDS and found_fields[name] != expected_fields[name]
    ]
    if differing:
        raise InputError(
            f"{path}: is of another model than the config asks for:\n  " + "\n  ".join(differing)
        )


def load(path: Path, mesh: jax.sharding.Mesh) -> tuple:
    """(config, graphdef, params on the mesh) of the student in `path`.

    Where its attention is for another kind of device than the mesh's, it is plain here.
    """
    config = read_config(path)
    if not attention.runs_on(config.attention, mesh.devices.flat[0].platform):
        config = dataclasses.replace(config, attention="plain")
    graphdef, abstract = t5.abstract_params(config)
    placed = sharding.with_shardings(mesh, abstract)
    return config, graphdef, read_params(path, config, placed)


def is_hugging_face(path: Path) -> bool:
    """Whether `path` holds a Hugging Face model."""
    return (path / "config.json").is_file()


def find_checkpoint(path: Path) -> tuple[Path, int]:
    """The directory and the step of an Orbax checkpoint.

    Args:
      path: a run's directory (its best checkpoint, else its newest) or one step's directory.

    Raises:
      InputError: where there is none.
    """
    path = path.absolute()
    if path.name.isdigit() and (path / "params").is_dir():
        return path.parent, int(path.name)
    for directory in (path / "best", path / "checkpoints"):
        if directory.is_dir():
            with CheckpointManager(directory, read_only=True) as manager:
                steps = manager.steps()
            if steps:
                return directory, steps[-1]
    raise InputError(
        f"{path}: found neither a checkpoint nor a Hugging Face model; expected a run's directory "
        "with checkpoints/, one step's directory in it, or a directory with config.json"
    )
