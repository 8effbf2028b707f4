"""Whether a checkpoint is what was saved: its layout by a checksum, its arrays by their digests.

One process reads here for itself, as `processes` (Orbax's MultiprocessingOptions) says; nothing
waits for another process.
"""

import contextlib
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from dslt.checkpoint.digests import array_digest, named_leaves
from dslt.checkpoint.layout import FORMAT_VERSION
from dslt.errors import InputError

ITEMS = ("params", "opt_state")
CHECKED_BYTES = 1 << 28  # of arrays that a check reads at a time

# No damage: a right that is missing, a full memory, a failing device, and what TensorStore says of
# a store that cannot be reached now.
_OTHER_TROUBLE = (OSError, MemoryError, jax.errors.JaxRuntimeError)
_PASSING = ("PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "UNAUTHENTICATED", "ABORTED")


class DamagedCheckpoint(InputError):
    """A checkpoint cannot be read whole, or is not what was saved."""


def checksum(content: dict) -> str:
    """Of a JSON object, its own `checksum` left out."""
    text = json.dumps({name: content[name] for name in sorted(content) if name != "checksum"})
    return f"{zlib.crc32(text.encode()):08x}"


def read_content(step_directory: Path, processes) -> dict:
    """The JSON of a checkpoint: its layout and, since format 2, digests.

    Raises:
      DamagedCheckpoint: it is not there, or not what was written.
    """
    path = step_directory / "layout"
    with _reading(path):
        handler = ocp.JsonCheckpointHandler(multiprocessing_options=processes)
        found = handler.restore(path, args=ocp.args.JsonRestore())
    version = found.get("format_version") if isinstance(found, dict) else None
    if not isinstance(version, int) or (version == FORMAT_VERSION and "checksum" not in found):
        raise DamagedCheckpoint(f"{path}: is damaged: it is no layout of a checkpoint")
    if "checksum" in found and found.pop("checksum") != checksum(found):
        raise DamagedCheckpoint(f"{path}: is damaged: its checksum is another")
    return found


def check_item(
    step_directory: Path, item: str, digests: dict | None, part: int, parts: int, processes
) -> None:
    """Reads the arrays of an item, every `parts`-th of them, and compares their digests.

    Args:
      digests: of each item of the checkpoint; None: only that they can be read is known.

    Raises:
      DamagedCheckpoint: an array is not what was saved.
      InputError: the checkpoint was written without the item.
    """
    path = step_directory / item
    if digests is not None and item not in digests:
        raise InputError(
            f"{step_directory}: was written without {item}, for use and not for resuming; name it "
            "as train.TrainConfig.init_from with another --run_dir"
        )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=processes)
    with _reading(path):
        named = named_leaves(handler.metadata(path).tree)
    arrays = {name: leaf for name, leaf in named if leaf.shape is not None}
    if digests is not None and arrays.keys() != digests[item].keys():
        differing = ", ".join(sorted(arrays.keys() ^ digests[item].keys()))
        raise DamagedCheckpoint(f"{path}: is damaged: of {differing} there is too much or too few")
    for group in _groups(dict(list(arrays.items())[part::parts])):
        with _reading(path):
            found = _read_arrays(handler, path, group)
        for name in group:
            if digests is not None and array_digest(found[name]) != digests[item][name]:
                raise DamagedCheckpoint(f"{path}: is damaged: {name} is not what was saved")


def _read_arrays(handler, path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Some of the arrays of an item, whatever mesh they were saved from.

    By way of a device, as `restore` takes: Orbax reads fewer files for an array of numpy's.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    tree = handler.metadata(path).tree
    leaves, structure = jax.tree.flatten(tree)
    asked = [
        leaf if name in names else ocp.PLACEHOLDER
        for (name, _), leaf in zip(named_leaves(tree), leaves, strict=True)
    ]
    placed = [ocp.ArrayRestoreArgs(sharding=device)] * len(leaves)
    args = ocp.args.PyTreeRestore(
        item=structure.unflatten(asked), restore_args=structure.unflatten(placed)
    )
    found = dict(named_leaves(handler.restore(path, args=args)))
    return {name: np.asarray(found[name]) for name in names}


def _groups(arrays: dict) -> Iterator[list[str]]:
    """Names of arrays in groups of CHECKED_BYTES, or of one larger array."""
    group, group_bytes = [], 0
    for name, leaf in arrays.items():
        size = int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        if group and group_bytes + size > CHECKED_BYTES:
            yield group
            group, group_bytes = [], 0
        group.append(name)
        group_bytes += size
    if group:
        yield group


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what Orbax raises over damaged files into DamagedCheckpoint."""
    try:
        yield
    except Exception as error:  # Orbax has no type for it: ValueError, KeyError, Exception itself
        is_absent = isinstance(error, FileNotFoundError | NotADirectoryError)
        is_passing = isinstance(error, _OTHER_TROUBLE) and not is_absent
        if is_passing:
            raise
        first_line = str(error).partition("\n")[0][:200]
        what = f"{type(error).__name__}: {first_line}"
        if any(word in what for word in _PASSING):
            raise InputError(
                f"{path}: cannot be read now, so whether it is whole is not known ({what}); start "
                "the same command again when it can"
            ) from None
        raise DamagedCheckpoint(f"{path}: is damaged: {what}") from None
