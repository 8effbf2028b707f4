"""URLs in place of directories: each command works on a mirror of the bucket."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from dslt import mirror
from dslt.bucket import hidden, is_url
from dslt.commands.processes import is_distributed


@contextlib.contextmanager
def local_run(args, mirrored: Callable) -> Iterator[None]:
    """Inside, `args.run_dir` is a plain path: as it was, or the mirror that `mirrored` makes.

    Raises InputError where several processes were asked to share a URL.
    """
    url = args.run_dir
    if not url or not is_url(url):
        yield
        return
    args.run_dir = hidden(url)  # what an error may show
    if is_distributed(args):
        mirror.refuse_several(url)
    with mirrored(url) as path:
        args.run_dir = str(path)
        yield


def local_student(student: str) -> Path:
    """The student's directory; a URL's is fetched."""
    return mirror.pull_student(student) if is_url(student) else Path(student)
