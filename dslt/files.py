"""Files that appear whole or not at all. Imports the standard library alone; open to all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replacing(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Yields a file beside `path` that takes its place when the block ends well.

    A kill, an error or a full disk on the way leaves what stood at `path` as it was. Missing
    parents are made. Text is UTF-8.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
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
