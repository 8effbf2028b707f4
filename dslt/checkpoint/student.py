"""A student wherever it lies: a run, one of its checkpoints, or a Hugging Face directory."""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from dslt.checkpoint import hf_t5
from dslt.checkpoint.integrity import DamagedCheckpoint
from dslt.checkpoint.layout import Layout
from dslt.checkpoint.manager import CheckpointManager, finished_steps
from dslt.core import attention, sharding, t5
from dslt.core.t5 import T5Config
from dslt.errors import InputError

DELETION_SECS = 1.0  # that the deletion of an old checkpoint may take


def read_params(path: Path, config: T5Config, abstract_params: dict) -> dict:
    """The parameters in `path`, placed by the shardings of `abstract_params`.

    Raises:
      InputError: where they belong to another model than `config`, with both sides.
    """
    if is_hugging_face(path):
        found_config, params = hf_t5.load_params(path)
        if lines := Layout(found_config).differences(Layout(config)):
            raise InputError(
                f"{path}: is of another model than the config asks for:\n  " + "\n  ".join(lines)
            )
        return jax.tree.map(_place, params, abstract_params)

    def read(directory: Path, step: int) -> dict:
        with CheckpointManager(directory, read_only=True) as manager:
            manager.check_layout(step, Layout(config))
            return manager.restore_params(step, abstract_params)

    return read_checkpoint(path, read)


def _place(array: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Puts the array where `like` is to be; each process sends what its own devices hold."""
    return jax.make_array_from_callback(array.shape, like.sharding, lambda index: array[index])


def load(path: Path, mesh: jax.sharding.Mesh) -> tuple:
    """(config, graphdef, params on the mesh) of the student in `path`.

    Where its attention is for another kind of device than the mesh's, it is plain here.
    """
    config, graphdef, params = load_to_host(path, mesh)
    abstract = sharding.with_shardings(mesh, t5.abstract_params(config)[1])
    return config, graphdef, jax.tree.map(_place, params, abstract)


def load_to_host(path: Path, mesh: jax.sharding.Mesh) -> tuple:
    """As `load`, with the parameters as numpy arrays, for who is to place them in another dtype."""
    if is_hugging_face(path):
        config, params = hf_t5.load_params(path)
    else:
        config, params = read_checkpoint(path, _read_to_host)
    if not attention.runs_on(config.attention, mesh.devices.flat[0].platform):
        config = dataclasses.replace(config, attention="plain")
    return config, t5.abstract_params(config)[0], params


def _read_to_host(directory: Path, step: int) -> tuple[T5Config, dict]:
    with CheckpointManager(directory, read_only=True) as manager:
        config = manager.layout(step).model
        return config, manager.restore_params(step, host_arrays(config))


def host_arrays(config: T5Config) -> dict:
    """Parameters that `CheckpointManager.restore_params` is to restore as numpy arrays."""
    abstract = t5.abstract_params(config)[1]
    return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract)


def is_hugging_face(path: Path) -> bool:
    """Whether `path` holds a Hugging Face model."""
    return (path / "config.json").is_file()


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is one step's directory, whole or not."""
    names = ("params", "layout", "_CHECKPOINT_METADATA")
    return path.name.isdigit() and any((path / name).exists() for name in names)


def read_checkpoint(path: Path, read: Callable):
    """`read(directory, step)` of what `find_checkpoint` finds; of what it finds then, where another
    process replaces the checkpoint meanwhile.
    """
    while True:
        directory, step = find_checkpoint(path)
        try:
            return read(directory, step)
        except (OSError, KeyError, ValueError):
            if not is_gone(directory, step):
                raise


def is_gone(directory: Path, step: int) -> bool:
    """Whether what could not be read is no longer there: half deleted it looks damaged."""
    time.sleep(DELETION_SECS)
    return step not in finished_steps(directory)


def find_checkpoint(path: Path) -> tuple[Path, int]:
    """The directory and the step of an Orbax checkpoint whose parameters are what was saved.

    Args:
      path: a run's directory (its best checkpoint, else its newest; damaged ones are named and
        passed over) or one step's directory.

    Raises:
      InputError: where there is none, or the one that was asked for is damaged.
    """
    path = path.absolute()
    if is_checkpoint(path):
        check_params(path.parent, int(path.name))
        return path.parent, int(path.name)
    damages = []
    for directory in (path / "best", path / "checkpoints"):
        for step in reversed(finished_steps(directory)):
            try:
                check_params(directory, step)
            except DamagedCheckpoint as error:
                if is_gone(directory, step):
                    return find_checkpoint(path)
                print(f"warning: {error}", file=sys.stderr)
                damages.append(error)
                continue
            if damages:
                print(f"warning: taking {directory / str(step)} instead", file=sys.stderr)
            return directory, step
    if damages:
        raise InputError(
            f"{path}: has no checkpoint that is whole; expected one of them restored from a copy:"
            "\n  " + "\n  ".join(map(str, damages))
        )
    raise InputError(
        f"{path}: found neither a checkpoint nor a Hugging Face model; expected a run's directory "
        "with checkpoints/, one step's directory in it, or a directory with config.json"
    )


def check_params(directory: Path, step: int) -> None:
    """Raises DamagedCheckpoint where the parameters of a checkpoint are not what was saved."""
    with CheckpointManager(directory, read_only=True) as manager:
        if damage := manager.find_damage(step, ("params",)):
            raise DamagedCheckpoint(damage)
