"""Orbax checkpoints: all that passes from training to the separate decode/eval loop.

A step directory holds three items, so that a reader takes only what it needs:

    checkpoints/1000/params/       float32 arrays by path
    checkpoints/1000/opt_state/    as optax keeps it
    checkpoints/1000/layout/       JSON: format version, model config, rationale_weight, …

    with CheckpointManager(directory, keep=3) as manager:
        manager.save(state, layout)          # returns at once; written in the background
        state = manager.restore(1000, abstract_state)
"""

import dataclasses
import logging
import typing
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from dslt.core.t5 import T5Config
from dslt.core.train_step import TrainState
from dslt.errors import InputError

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the arrays of a checkpoint mean.

    Attributes:
      model: rebuilds the graph definition; dtype and remat in it are choices, the rest are shapes.
      format_version: of this directory layout.
    """

    model: T5Config
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict:
        """A JSON object that `from_json` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, found: dict, where: Path) -> "Layout":
        """Raises InputError where another version wrote it, or it is damaged."""
        if not isinstance(found, dict):
            raise InputError(f"{where}: the layout is {found!r}; expected an object")
        if found.get("format_version") != FORMAT_VERSION:
            raise InputError(
                f"{where}: checkpoint format {found.get('format_version')!r}; this version of dslt "
                f"reads format {FORMAT_VERSION}. Use the version named in the run's run.json"
            )
        model = found.get("model")
        hints = typing.get_type_hints(T5Config)
        if not isinstance(model, dict) or not all(
            name in hints and _fits(value, hints[name]) for name, value in model.items()
        ):
            raise InputError(
                f"{where}: the layout's model is {model!r}; expected the fields of a T5Config: "
                + ", ".join(hints)
            )
        try:
            return cls(model=T5Config(**model), format_version=found["format_version"])
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


def _fits(value: object, hint: type) -> bool:
    """Whether a JSON value is one of a field; a whole number will do for a float."""
    kinds = typing.get_args(hint) or (hint,)
    return type(value) in kinds or (float in kinds and type(value) is int)


class CheckpointManager:
    """The checkpoints of one directory: saved in the background, the latest few kept."""

    def __init__(
        self,
        directory: Path,
        keep: int | None = None,
        read_only: bool = False,
        together: bool = False,
    ):
        """`keep=None` keeps all. A read-only manager never creates or deletes anything.

        With `together` all processes make one and call it alike, and each saves and restores what
        its own devices hold. Without, this process does all alone, whatever the others do; then it
        can save arrays in the host's memory, or on the devices of a single process.
        """
        if together:
            processes = ocp.options.MultiprocessingOptions()
        else:
            me = jax.process_index()
            processes = ocp.options.MultiprocessingOptions(
                primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
            )
            if not read_only:
                directory.mkdir(parents=True, exist_ok=True)  # Orbax makes it for all or for none
        # Orbax warns on every restore of part of a checkpoint, which is what evaluation does.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.directory = directory.absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "params": ocp.StandardCheckpointHandler(multiprocessing_options=processes),
                "opt_state": ocp.StandardCheckpointHandler(multiprocessing_options=processes),
                "layout": ocp.JsonCheckpointHandler(multiprocessing_options=processes),
            },
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else keep,
                create=together and not read_only,
                read_only=read_only,
                multiprocessing_options=processes,
            ),
        )

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, *_):
        """Waits for the save in progress."""
        self._manager.close()

    def steps(self) -> list[int]:
        """The finished checkpoints on disk now, ascending."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, layout: Layout) -> None:
        """Copies the state off the devices and writes it in the background."""
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                opt_state=ocp.args.StandardSave(state.opt_state),
                layout=ocp.args.JsonSave(layout.to_json()),
            ),
        )

    def save_params(self, step: int, params: dict, layout: Layout) -> None:
        """Writes a checkpoint for use, not for resuming: no optimizer state."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                layout=ocp.args.JsonSave(layout.to_json()),
            ),
            force=True,  # else a step below the newest is silently not saved
        )

    def replace_all(self, step: int, params: dict, layout: Layout) -> None:
        """Leaves this checkpoint of parameters alone in the directory, whatever steps were there.

        The new one is on disk before an old one goes. A step that is there already stays.
        """
        others = [other for other in self.steps() if other != step]
        if step not in self.steps():
            self.save_params(step, params, layout)
            self.wait()
        for other in others:
            self._manager.delete(other)

    def wait(self) -> None:
        """Until everything saved so far is on disk."""
        self._manager.wait_until_finished()

    def layout(self, step: int) -> Layout:
        """What the checkpoint of `step` says of itself."""
        restored = self._manager.restore(
            step, args=ocp.args.Composite(layout=ocp.args.JsonRestore())
        )
        return Layout.from_json(restored["layout"], self.directory / str(step))

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The whole state, placed by the shardings of `abstract` (ShapeDtypeStructs)."""
        self._check_shapes(step, abstract.params)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params),
                opt_state=ocp.args.StandardRestore(abstract.opt_state),
            ),
        )
        step_array = jax.device_put(jax.numpy.int32(step), abstract.step.sharding)
        return TrainState(step_array, restored["params"], restored["opt_state"])

    def restore_params(self, step: int, abstract_params: dict) -> dict:
        """The parameters alone, placed as `abstract_params` says."""
        self._check_shapes(step, abstract_params)
        args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract_params))
        return self._manager.restore(step, args=args)["params"]

    def _check_shapes(self, step: int, abstract_params: dict) -> None:
        """Both sides' shapes are shown before Orbax would fail on the first."""
        found = _shapes(self._manager.item_metadata(step)["params"].tree)
        expected = _shapes(abstract_params)
        lines = [
            f"{name}: found {found.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
            for name in sorted(found.keys() | expected.keys())
            if found.get(name) != expected.get(name)
        ]
        if lines:
            raise InputError(
                f"{self.directory / str(step)}: the checkpoint is of another model than the config "
                "asks for:\n  " + "\n  ".join(lines[:10])
            )


def finished_steps(directory: Path) -> list[int]:
    """The finished checkpoints on disk, ascending; none where there is no directory."""
    if not directory.is_dir():
        return []
    found = ocp.path.step.standard_name_format().find_all(directory.absolute())
    return sorted(checkpoint.step for checkpoint in found)


def _shapes(tree: dict) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }
