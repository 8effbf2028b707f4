"""Orbax checkpoints: all that passes from training to the separate decode/eval loop.

A step directory holds three items, so that a reader takes only what it needs:

    checkpoints/1000/params/       float32 arrays by path
    checkpoints/1000/opt_state/    as optax keeps it
    checkpoints/1000/layout/       JSON: what the arrays mean, their digests, who wrote them

A checkpoint that cannot be read, or whose arrays are not those that were saved, is damaged. Nothing
here deletes one: it stays, or is set aside where its step has to be saved again.

    with CheckpointManager(directory, keep=3) as manager:
        manager.save(state, layout)          # returns at once; written in the background
        state = manager.restore(1000, abstract_state)
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from dslt.checkpoint.digests import named_leaves, tree_digests
from dslt.checkpoint.integrity import (
    ITEMS,
    DamagedCheckpoint,
    check_item,
    checksum,
    read_content,
)
from dslt.checkpoint.layout import Layout
from dslt.core.train_step import TrainState
from dslt.errors import InputError
from dslt.files import naming_full_disk


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
        self._processes = processes
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
        with naming_full_disk(self.directory):
            self._manager.close()

    def steps(self) -> list[int]:
        """The finished checkpoints on disk now, ascending."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, layout: Layout) -> None:
        """Copies the state off the devices and writes it in the background.

        Raises:
          InputError: the disk is full. What the background finds is raised by the next call.
        """
        items = {"params": state.params, "opt_state": state.opt_state}
        self._save(int(state.step), items, layout)

    def save_params(self, step: int, params: dict, layout: Layout) -> None:
        """Writes a checkpoint for use, not for resuming: no optimizer state."""
        self._save(step, {"params": params}, layout, force=True)

    def _save(self, step: int, items: dict, layout: Layout, force: bool = False) -> None:
        """`force`, or else a step below the newest is silently not saved."""
        content = layout.to_json() | {"step": step}
        content["digests"] = {name: tree_digests(tree) for name, tree in items.items()}
        content["checksum"] = checksum(content)
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        args["layout"] = ocp.args.JsonSave(content)
        with naming_full_disk(self.directory):
            self._manager.save(step, args=ocp.args.Composite(**args), force=force)

    def replace_all(self, step: int, params: dict, layout: Layout) -> None:
        """Leaves this checkpoint of parameters alone in the directory, whatever steps were there.

        The new one is on disk before an old one goes. A step that is there already stays, unless
        it is damaged.
        """
        others = [other for other in self.steps() if other != step]
        if step in self.steps() and self.find_damage(step, ("params",)):
            self.set_aside(step)
        if step not in self.steps():
            self.save_params(step, params, layout)
            self.wait()
        for other in others:
            self._manager.delete(other)

    def wait(self) -> None:
        """Until everything saved so far is on disk."""
        with naming_full_disk(self.directory):
            self._manager.wait_until_finished()

    def layout(self, step: int) -> Layout:
        """What the checkpoint of `step` says of itself. Raises DamagedCheckpoint, InputError."""
        path = self.directory / str(step)
        return Layout.from_json(read_content(path, self._processes), path)

    def check_layout(self, step: int, expected: Layout) -> None:
        """Raises InputError where the checkpoint is of another model, with both sides."""
        if lines := self.layout(step).differences(expected):
            raise InputError(
                f"{self.directory / str(step)}: is of another model than the config asks for:\n  "
                + "\n  ".join(lines)
            )

    def find_damage(
        self, step: int, items: Sequence[str] = ITEMS, part: int = 0, parts: int = 1
    ) -> str | None:
        """What is wrong with a checkpoint, in a sentence; None if it is what was saved.

        Reads the arrays, CHECKED_BYTES at a time, and holds them against their digests; one of
        format 1 has none, so of it only that all can be read is known.

        Args:
          items: which of ITEMS.
          part, parts: of several processes each may read its share of the arrays.

        Raises:
          InputError: the checkpoint is of a version that cannot be read, or has no such item.
        """
        path = self.directory / str(step)
        try:
            content = read_content(path, self._processes)
            Layout.from_json(content, path)
            if content.get("step", step) != step:
                raise DamagedCheckpoint(f"{path}: is damaged: it is of step {content['step']}")
            for item in items:
                check_item(path, item, content.get("digests"), part, parts, self._processes)
        except DamagedCheckpoint as error:
            return str(error)
        return None

    def set_aside(self, step: int) -> Path:
        """Moves a damaged checkpoint out of the way of the next save; returns where it lies."""
        aside = self.directory.parent / "damaged"
        aside.mkdir(exist_ok=True)
        name, number = f"{self.directory.name}-{step}", 0
        while (aside / name).exists():
            number += 1
            name = f"{self.directory.name}-{step}-{number}"
        (self.directory / str(step)).rename(aside / name)
        self._manager.reload()
        return aside / name

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The whole state, placed by the shardings of `abstract` (ShapeDtypeStructs).

        Of a checkpoint in which `find_damage` has found none: what Orbax does with another is its
        own affair.

        Raises:
          InputError: the state is of another model, or of another optimizer.
        """
        self._check_shapes(step, abstract.params)
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            opt_state=ocp.args.StandardRestore(abstract.opt_state),
        )
        try:
            restored = self._manager.restore(step, args=args)
        except ValueError as error:
            if "tree structures do not match" not in str(error):
                raise
            path = self.directory / str(step)
            raise InputError(
                f"{path}: its optimizer's state is of another kind than the config asks for "
                "(optimizer.OptimizerConfig.name, or weight_decay, which is zero in one of them). "
                "Ask for the same, or begin with its parameters alone: "
                f"train.TrainConfig.init_from = {str(path)!r}"
            ) from None
        step_array = jax.device_put(jax.numpy.int32(step), abstract.step.sharding)
        return TrainState(step_array, restored["params"], restored["opt_state"])

    def restore_params(self, step: int, abstract_params: dict) -> dict:
        """The parameters alone, placed as `abstract_params` says; otherwise as `restore`."""
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
    return {name: tuple(leaf.shape) for name, leaf in named_leaves(tree)}
