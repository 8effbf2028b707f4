"""Objects below a URL: what a mirror reads and writes of a bucket.

May import fsspec, inside `Bucket` alone, so that plain paths do without it.

    bucket = Bucket("gs://bucket/run")
    bucket.put_all({Path("run.json"): "run.json"})
    bucket.find()  # {"run.json": {"size": 812, ...}}
"""

import contextlib
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from dslt.errors import InputError
from dslt.files import naming_full_disk

RETRY_SECS = (1.0, 2.0, 4.0, 8.0)  # between attempts at one file
TRANSFERS = 8  # at a time

# A secret may have slashes; a number with one behind it is a port.
_KEY = re.compile(r"//([^/]*|[^/@:]*:(?!\d+/)[^@\s]*)@")


def is_url(path: str) -> bool:
    """Whether a path is a URL, such as gs://bucket/run."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None


def hidden(url: str) -> str:
    """The URL without the credentials that it may hold: `https://key:secret@host/run?sig=secret`."""
    return re.sub(r"\?\S+", "?***", _KEY.sub("//***@", url))


class Bucket:
    """Objects below a URL, by names relative to it. All errors are InputErrors, but for an object
    that is not there.

    Attributes:
      url: without credentials.
    """

    def __init__(self, url: str):
        """Raises InputError where what speaks to such a store is not installed."""
        self.url = hidden(url).rstrip("/")
        self._secret = _KEY.search(url)
        self._digest = hashlib.sha256(_KEY.sub("//***@", url).rstrip("/").encode()).hexdigest()
        try:
            import fsspec
        except ModuleNotFoundError:
            raise InputError(
                f"{self.url}: fsspec is not installed; expected pip install 'dslt[remote]'"
            ) from None
        options = {"auto_mkdir": True} if url.startswith(("file:", "local:")) else {}
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url.rstrip("/"), **options)
        except (ImportError, ValueError) as error:
            raise InputError(
                f"{self.url}: {self._said(error)}; expected a URL that fsspec knows, and its "
                "package: pip install gcsfs for gs://, s3fs for s3://, adlfs for az://"
            ) from None

    def mirror(self, name: str) -> Path:
        """Where on this machine a mirror of this bucket lies; its last part is the run's name."""
        given = os.environ.get("DSLT_MIRROR_DIR")
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        base = Path(given).absolute() if given else Path(cache) / "dslt" / "mirror"
        run = PurePosixPath(self._root.partition("?")[0]).name or "run"
        return base / self._digest[:16] / name / run

    def find(self, under: str = "") -> dict[str, dict]:
        """All objects, by name, with what the store says of each."""

        def find() -> dict:
            self._fs.invalidate_cache()
            return self._fs.find(self._path(under), detail=True)

        try:
            found = self._try("list", under, find)
        except FileNotFoundError:
            return {}
        root = self._path("")
        names = {path.removeprefix(root): info for path, info in found.items() if path != root}
        for name in names:
            if {"", ".", ".."} & set(name.split("/")):
                raise InputError(f"{self.url}: holds an object {name!r}, which is no file's name")
        return names

    def read(self, name: str) -> bytes | None:
        """An object's content; None if there is none."""
        try:
            return self._try("read", name, lambda: self._fs.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def read_json(self, name: str) -> dict:
        """A JSON object; {} if there is none."""
        content = self.read(name)
        try:
            found = {} if content is None else json.loads(content)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise InputError(f"{self.url}/{name}: is no JSON object; it was changed by another")
        return found

    def write(self, name: str, content: bytes) -> None:
        self._try("write", name, lambda: self._fs.pipe_file(self._path(name), content))

    def put(self, path: Path, name: str) -> None:
        """Sends a file. One that went meanwhile is passed over."""
        with contextlib.suppress(FileNotFoundError):
            self._try("write", name, lambda: self._fs.put_file(str(path), self._path(name)), path)

    def put_all(self, files: dict[Path, str]) -> None:
        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(self.put, files.keys(), files.values()))

    def get(self, name: str, path: Path) -> None:
        """Fetches a file, which appears whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")

        def get() -> None:
            with naming_full_disk(path):
                self._fs.get_file(self._path(name), str(partial))

        try:
            self._try("read", name, get)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def get_all(self, files: dict[str, Path]) -> None:
        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(self.get, files.keys(), files.values()))

    def remove(self, names: list[str]) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._try("delete", names[0], lambda: self._fs.rm([self._path(n) for n in names]))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _try(self, verb: str, name: str, function: Callable, source: Path | None = None):
        """Calls a function, again after a while where the store fails.

        Raises FileNotFoundError where an object that is read, or the `source` that is sent, is not
        there; otherwise InputError.
        """
        where = f"{self.url}/{name}" if name else self.url
        for pause in (*RETRY_SECS, None):
            try:
                return function()
            except InputError:
                raise
            except Exception as error:  # each store has its own types
                is_absent = isinstance(error, FileNotFoundError)
                is_lasting = is_absent or isinstance(error, PermissionError)
                is_lasting |= "Credentials" in type(error).__name__  # botocore's, google.auth's
                if is_absent and (verb != "write" or (source and not source.exists())):
                    raise FileNotFoundError(f"{where}: is not there any more") from None
                if pause is None or is_lasting:
                    raise InputError(
                        f"{where}: cannot {verb} it ({self._said(error)}); expected a bucket that "
                        "exists and credentials that may read and write there"
                    ) from None
                time.sleep(pause)

    def _said(self, error: Exception) -> str:
        """An error in a line, without the URL's credentials."""
        line = f"{type(error).__name__}: {error}".partition("\n")[0]
        if self._secret:
            for secret in (self._secret[1], self._secret[1].partition(":")[2] or self._secret[1]):
                line = line.replace(secret, "***")
        return hidden(line)[:300]
