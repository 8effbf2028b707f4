"""Files that appear whole or not at all. Imports the standard library alone; open to all."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from dslt.errors import InputError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXTS = tuple(os.strerror(number) for number in _FULL)


@contextlib.contextmanager
def replacing(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Yields a file beside `path` that takes its place when the block ends well.

    A kill, an error or a full disk (an InputError) on the way leaves what stood at `path` as it
    was. Missing parents are made. Text is UTF-8.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with naming_full_disk(path):
        try:
            with partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # a machine may be taken away, not only the process
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a whole file, as `replacing` does."""
    with replacing(path) as file:
        file.write(text)


def lock_file(file: IO) -> bool:
    """Locks an open file for this process until it is closed; False where another one has it.

    A file system without locks tells of no other: True.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@contextlib.contextmanager
def naming_full_disk(path: str | os.PathLike) -> Iterator[None]:
    """Raises InputError where the block finds the disk of `path` full."""
    try:
        yield
    except Exception as error:
        if full := full_disk_error(path, error):
            raise full from None
        raise


def full_disk_error(path: str | os.PathLike, error: BaseException) -> InputError | None:
    """What to tell of an error that a full disk has caused while `path` was written; else None.

    Libraries wrap it in errors of their own, so its text counts too.
    """
    if isinstance(error, InputError):  # says already what it is
        return None
    while not _is_full(error):
        error = error.__cause__ or error.__context__
        if error is None:
            return None
    there = Path(path).absolute()
    while not there.exists():
        there = there.parent
    usage = shutil.disk_usage(there)
    where = f"the file system of {there}, mounted at {mount_point(there)}"
    return InputError(
        f"{path}: the disk is full ({_reason(error)}); {usage.free / 1e6:.1f} of "
        f"{usage.total / 1e6:.1f} MB are free on {where}. What was whole before is whole still. "
        "Make room there and start the same command again"
    )


def mount_point(path: Path) -> Path:
    """The directory at which the file system of an absolute path is mounted."""
    while not os.path.ismount(path):
        path = path.parent
    return path


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return any(text in str(error) for text in _FULL_TEXTS)


def _reason(error: BaseException) -> str:
    return next((text for text in _FULL_TEXTS if text in str(error)), os.strerror(errno.ENOSPC))
