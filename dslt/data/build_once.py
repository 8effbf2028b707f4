"""Directories that appear whole or not at all, built once by whoever comes first.

Imports the standard library and dslt.files alone.

    directory = open_or_build(cache_dir, "svamp_label-0123", lambda path: fill(path))
"""

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dslt.files import naming_full_disk

LEFT_SECS = 86_400  # after which another host's half-built directory is nobody's


def open_or_build(cache_dir: Path, name: str, build: Callable[[Path], None]) -> Path:
    """Returns the directory `name` of `cache_dir`; where it is missing, `build` fills one first.

    It is built under another name and then renamed, so it is whole wherever it exists, whoever is
    killed. A lock lets concurrent starters wait for the first; where the file system has none they
    all build, and the first to rename wins.
    """
    final = cache_dir / name
    if final.is_dir():
        return final
    cache_dir.mkdir(parents=True, exist_ok=True)
    _sweep(cache_dir)
    with _lock(_lock_path(cache_dir, name)):
        if final.is_dir():
            return final
        partial = Path(tempfile.mkdtemp(prefix=f".{name}~{socket.gethostname()}~", dir=cache_dir))
        try:
            with naming_full_disk(cache_dir):
                build(partial)
            partial.chmod(0o755)
            partial.rename(final)
        except OSError:
            if not final.is_dir():  # else another builder was first
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return final


def _sweep(cache_dir: Path) -> None:
    """Removes what killed builders have left: `.NAME~HOST~…` whose lock nobody holds, and locks.

    A lock may hold on one host alone, so what another host has left must be a day old, too.
    """
    for partial in cache_dir.glob(".*~*~*"):
        name, host, _ = partial.name[1:].split("~", 2)
        with (
            _lock(_lock_path(cache_dir, name), wait=False) as is_ours,
            contextlib.suppress(OSError),
        ):
            age_secs = time.time() - partial.stat().st_mtime
            if is_ours and (host == socket.gethostname() or age_secs > LEFT_SECS):
                shutil.rmtree(partial)
    for path in cache_dir.glob(".*.lock"):
        with _lock(path, wait=False):
            pass  # its file goes with it


def _lock_path(cache_dir: Path, name: str) -> Path:
    return cache_dir / f".{name}.lock"


@contextlib.contextmanager
def _lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Whether this process has the lock: not where the file system has none, or, without `wait`,
    where another has it. The lock's file goes with it."""
    is_ours = False
    while not is_ours:
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            break
        # Who had it before may have removed the file that was waited for.
        with contextlib.suppress(FileNotFoundError):
            is_ours = os.path.samestat(os.fstat(file.fileno()), path.stat())
        if not is_ours:
            file.close()
    with file:
        try:
            yield is_ours
        finally:
            if is_ours:
                path.unlink(missing_ok=True)
