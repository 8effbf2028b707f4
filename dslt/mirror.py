"""A run in a bucket: worked on in a directory of this machine, its mirror, and written back.

May import bucket, signals and workdir. Every command works on plain paths; a URL becomes one here:

    with mirror.training("gs://bucket/run") as path:      # filled from the bucket, sent to it
    with mirror.evaluating("gs://bucket/run", follow=True) as path:
    path = mirror.pull_student("gs://bucket/run")

The bucket holds what a run's directory holds (see workdir), and two files more:

    RUN/mirror.json                which run this is, who writes it, its newest checkpoint
    RUN/checkpoints/STEP/_MIRROR   names and sizes of the checkpoint's files

An object store has no rename: files appear one after the other. So `_MIRROR` is written last, and a
checkpoint without it, or with a file that is not as it says, is not there. Trainer and evaluator
may be on two machines; each writes files of its own. What a reader waits for (run.json and
evaluations.jsonl) is sent after what it speaks of.

Beside an evaluator's mirror, on this machine alone, lies `sent.jsonl`: the rows of its
evaluations.jsonl that the bucket has had. A step may be judged again, here or elsewhere; a row of
this machine that is not among them is newer than the bucket's.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from dslt import signals
from dslt.bucket import Bucket, hidden
from dslt.errors import InputError
from dslt.files import lock_file, write_text
from dslt.workdir import (
    best_row,
    format_json_rows,
    parse_json_rows,
    read_json_rows,
    write_json_rows,
)

SYNC_SECS = 10.0  # between looks at what is new, here and in the bucket

IDENTITY = "mirror.json"
MARKER = "_MIRROR"
SCRATCH = "scratch-"
SENT = "sent.jsonl"

TRAIN, EVALUATE = "train", "evaluate"
_OF_EVALUATION = ("evaluations", "evaluations.jsonl", "best")
_CHECKPOINTS = {TRAIN: "checkpoints", EVALUATE: "best"}  # what each writes
_LAST = {TRAIN: "run.json", EVALUATE: "evaluations.jsonl"}  # the file that speaks of the others

_ADVICE = (
    "several processes share one directory; mount the bucket (gcsfuse BUCKET DIRECTORY) on every "
    "worker and name the directory there, as launch/tpu.sh does"
)


class Taken(InputError):
    """Another training has taken the run over."""


def refuse_several(url: str) -> None:
    """Raises InputError, for commands that were asked to run in several processes."""
    raise InputError(f"{hidden(url)}: {_ADVICE}")


@contextlib.contextmanager
def training(url: str) -> Iterator[Path]:
    """A directory to train in, filled from the bucket; what appears in it is sent there.

    At the end, by a signal or an error too, what is left is sent before the block is left.

    Raises:
      InputError: the bucket cannot be used, holds something else, or has lost its checkpoints;
        in the end, not everything could be sent.
    """
    bucket = RunBucket(url)
    with _locked(bucket, TRAIN):
        identity = bucket.identity()
        if not identity and bucket.find():
            raise InputError(
                f"{bucket.url}: holds files that no run with this URL has written; expected an "
                "empty place, or such a run. To use a run that was copied there, copy it back to "
                "a directory of this machine, or mount the bucket"
            )
        identity.setdefault("run", uuid.uuid4().hex)
        # The directory of the last session is as new as the bucket, or newer where not all of it
        # could be sent. Any other is older, and stays as it is.
        path = bucket.mirror(f"{TRAIN}-{identity.get('session')}")
        if "session" not in identity or not path.is_dir():
            identity["session"] = uuid.uuid4().hex
            path = bucket.mirror(f"{TRAIN}-{identity['session']}")
            pull_training(bucket, identity, path)
            bucket.write(IDENTITY, _json(identity))
        print(f"mirror      {bucket.url} in {path}", flush=True)
        with _synchronised(Mirror(bucket, path, TRAIN, identity)):
            yield path


@contextlib.contextmanager
def evaluating(url: str, follow: bool = False) -> Iterator[Path]:
    """A directory with the run's checkpoints, which are pulled as they come; without optimizer
    state. Evaluations, those that could not be sent before too, and the best checkpoint are sent
    to the bucket.

    Args:
      follow: wait for a run that has not begun.

    Raises:
      InputError: there is no such run; in the end, not everything could be sent.
    """
    bucket = RunBucket(url)
    with _locked(bucket, EVALUATE):
        identity = bucket.identity()
        if not identity and not follow:
            raise InputError(f"{bucket.url}: holds no run; expected one that `dslt train` wrote")
        if not identity:
            print(f"waiting for `dslt train` to start {bucket.url}", flush=True)
        while not identity:
            time.sleep(SYNC_SECS)
            identity = bucket.identity()
        path = bucket.mirror(f"{EVALUATE}-{identity['run']}")
        path.mkdir(parents=True, exist_ok=True)
        pull_evaluations(bucket, path)
        mirror = Mirror(bucket, path, EVALUATE, identity)
        mirror.pull()
        print(f"mirror      {bucket.url} in {path}", flush=True)
        with _synchronised(mirror):
            yield path


def pull_student(url: str) -> Path:
    """A directory with the student at `url` (a run, a checkpoint of it, or a Hugging Face
    directory): of a run its best checkpoint, else its newest, without optimizer state.

    Raises:
      InputError: there is none.
    """
    *_, parent, name = ["", "", *url.rstrip("/").split("/")]
    step = int(name) if parent in _CHECKPOINTS.values() and name.isdigit() else None
    root = url.rstrip("/").removesuffix(f"/{parent}/{name}") if step is not None else url
    bucket = RunBucket(root)
    listing = bucket.find()
    if "config.json" in listing:  # Hugging Face's
        files = {name: details for name, details in listing.items() if "/" not in name}
        state = hashlib.sha256(_state(files).encode()).hexdigest()
        path = bucket.mirror(f"student-{state[:16]}")
        if not path.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=SCRATCH) as scratch:
                whole = Path(scratch) / path.name
                bucket.get_all({name: whole / name for name in files})
                try:
                    whole.rename(path)
                except OSError:
                    if not path.is_dir():  # else another process was first, with the same
                        raise
        return path
    if IDENTITY not in listing:
        raise InputError(
            f"{bucket.url}: holds neither a run that `dslt train` wrote there nor a Hugging Face "
            "directory; expected one of them. A run that was copied there: copy it back first"
        )
    path = bucket.mirror(f"student-{bucket.identity()['run']}")
    names = ("run.json", "config.gin", "student.json", "evaluations.jsonl")
    wanted = [name for name in listing if name in names or name.startswith("vocabulary/")]
    bucket.get_all({name: path / name for name in wanted})
    for directory in [parent] if step is not None else ["best", "checkpoints"]:
        found = bucket.checkpoints(directory, listing)
        chosen = max(found, default=None) if step is None else step
        remove_steps(path / directory, keep={chosen})
        if chosen in found:
            pull_checkpoint(bucket, path, directory, chosen, found[chosen], without=("opt_state",))
            return path if step is None else path / directory / str(step)
    raise InputError(f"{hidden(url)}: holds no whole checkpoint; expected one by `dslt train`")


class RunBucket(Bucket):
    """A bucket that holds a run."""

    def __init__(self, url: str):
        super().__init__(url)
        self._passed_over: set[tuple[str, int]] = set()

    def identity(self) -> dict:
        """Which run this is; {} if there is none."""
        found = self.read_json(IDENTITY)
        named = [found.get("run", ""), found.get("session", "")]  # they become directories
        if found and not all(re.fullmatch("[0-9a-f]{32}", str(name)) for name in named):
            raise InputError(f"{self.url}/{IDENTITY}: is not what `dslt train` writes; restore it")
        return found

    def evaluations(self) -> list[dict]:
        """The rows of evaluations.jsonl."""
        name = "evaluations.jsonl"
        return parse_json_rows(self.read(name) or b"", f"{self.url}/{name}")

    def checkpoints(self, directory: str, listing: dict[str, dict]) -> dict[int, dict[str, int]]:
        """The whole checkpoints in a directory of a listing: step → sizes of its files."""
        found = {}
        for step, files in steps_of(directory, listing).items():
            if MARKER not in files:
                continue
            stated = self.read_json(f"{directory}/{step}/{MARKER}").get("files")
            if isinstance(stated, dict) and stated and stated.items() <= files.items():
                found[step] = stated
            elif (directory, step) not in self._passed_over:
                self._passed_over.add((directory, step))
                where = f"{self.url}/{directory}/{step}"
                print(
                    f"warning: {where}: is passed over: not all its files are there as they were "
                    "sent",
                    file=sys.stderr,
                )
        return found


class Mirror:
    """A directory of this machine and the bucket of which it is the mirror.

    Attributes:
      path: the directory.
      role: TRAIN or EVALUATE: which files this side writes.
    """

    def __init__(self, bucket: RunBucket, path: Path, role: str, identity: dict):
        self.bucket, self.path, self.role = bucket, path, role
        self._identity = identity
        self._sent: dict[str, object] = {}  # name → as what it was sent last
        self._pulled: dict[str, str] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._synchronise, daemon=True)

    def start(self) -> None:
        """Begins to look for what is new, in a thread."""
        for left in self.path.parent.glob(f"{SCRATCH}*"):  # by a kill
            shutil.rmtree(left)
        self._thread.start()

    def close(self) -> None:
        """Sends what is left. Raises InputError where that fails."""
        self._is_over.set()
        print(f"sending what is left to {self.bucket.url}", flush=True)
        self._thread.join()
        try:
            self.push()
        except Taken:
            raise
        except InputError as error:
            raise InputError(
                f"{error}. Not everything is in the bucket; it is whole in {self.path}, and the "
                "same command on this machine sends it"
            ) from None
        print(f"all is in {self.bucket.url}", flush=True)

    def _synchronise(self) -> None:
        said = ""
        while not self._is_over.wait(SYNC_SECS):
            try:
                if self.role == EVALUATE:
                    self.pull()
                self.push()
                said = ""
            except (InputError, OSError) as error:  # the next round tries again, and the last says
                if str(error) != said:
                    said = str(error)
                    print(f"\nwarning: {said}; tried again later", file=sys.stderr, flush=True)

    def push(self) -> None:
        """Sends what is new: files, then checkpoints, then the file that speaks of them; and
        deletes checkpoints that are gone here.
        """
        last = self.path / _LAST[self.role]
        content = last.read_bytes() if last.exists() else None  # before a look at the others
        directory = _CHECKPOINTS[self.role]
        steps = local_steps(self.path / directory)
        self._push_files()
        if self.role == TRAIN and content is not None:
            # A checkpoint needs run.json; `finished` would tell an evaluator that none will come.
            running = json.loads(content)
            if running.get("state") != "running" and self._sent.get(last.name) != content:
                self._write(last.name, _json(running | {"state": "running"}))
            else:
                self._write(last.name, content)
        is_new = self._sent.get(directory) != steps
        are_sent = is_new and self._push_checkpoints(directory, steps)
        if content is not None and self.role == EVALUATE:  # another machine may judge too
            own = parse_json_rows(content, last)
            unsent = unsent_rows(self.path, own)
            rows = merge_rows(own, self.bucket.evaluations(), unsent)
            self._write(last.name, format_json_rows(rows).encode())
            if unsent:
                write_json_rows(self.path.with_name(SENT), own)
        elif content is not None:
            self._write(last.name, content)
        if are_sent and steps:
            self._remove_checkpoints(directory, steps)

    def _write(self, name: str, content: bytes) -> None:
        if self._sent.get(name) != content:
            self._check_owner()
            self.bucket.write(name, content)
            self._sent[name] = content

    def _push_files(self) -> None:
        new = {}
        for name in self._own_files():
            with contextlib.suppress(FileNotFoundError):
                status = (self.path / name).stat()
                new[name] = (status.st_size, status.st_mtime_ns)
        new = {name: state for name, state in new.items() if self._sent.get(name) != state}
        if new:
            self._check_owner()
        self.bucket.put_all({self.path / name: name for name in new})
        self._sent |= new

    def _own_files(self) -> Iterator[str]:
        """Names of this side's files outside of checkpoints, but the one that is sent last."""
        for directory, inside, files in os.walk(self.path):  # passes over what goes meanwhile
            base = Path(directory)
            if base == self.path:
                is_evaluation = self.role == EVALUATE
                apart = (*_CHECKPOINTS.values(), _LAST[self.role])
                for names in (inside, files):
                    names[:] = [
                        name
                        for name in names
                        if (name in _OF_EVALUATION) == is_evaluation and name not in apart
                    ]
            for name in files:
                if not name.endswith(".partial") and not (base / name).is_symlink():
                    yield (base / name).relative_to(self.path).as_posix()

    def _push_checkpoints(self, directory: str, steps: dict[int, object]) -> bool:
        """Sends checkpoints that are not in the bucket; whether all are there then."""
        self._check_owner()
        there = steps_of(directory, self.bucket.find(directory))
        are_sent = [
            self._push_checkpoint(directory, step, there.get(step, {})) for step in sorted(steps)
        ]
        return all(are_sent)

    def _remove_checkpoints(self, directory: str, steps: dict[int, object]) -> None:
        """Deletes checkpoints in the bucket that are gone here; where the best by its rows is
        there, all others, whatever is here.
        """
        self._check_owner()
        there = steps_of(directory, self.bucket.find(directory))
        kept = set(steps)
        best = best_row(self.bucket.evaluations()) if self.role == EVALUATE else None
        if best and MARKER in there.get(best["step"], {}):
            kept = {best["step"]}
        for step in there.keys() - kept:
            prefix = f"{directory}/{step}"
            if MARKER in there[step]:  # first: what is left without it counts for nothing
                self.bucket.remove([f"{prefix}/{MARKER}"])
            if names := there[step].keys() - {MARKER}:
                self.bucket.remove([f"{prefix}/{name}" for name in names])
        self._sent[directory] = steps

    def _push_checkpoint(self, directory: str, step: int, there: dict[str, int]) -> bool:
        """Sends one, unless the bucket has it; False where newer ones have replaced it meanwhile.

        Hard links keep its files until they are sent, though training deletes them.
        """
        source = self.path / directory / str(step)
        prefix = f"{directory}/{step}"
        with tempfile.TemporaryDirectory(dir=self.path.parent, prefix=SCRATCH) as scratch:
            links = Path(scratch) / str(step)
            try:
                shutil.copytree(source, links, copy_function=_link)
            except (shutil.Error, FileNotFoundError):
                if source.exists():
                    raise
                return False
            sizes = _sizes(links)
            if MARKER in there:
                stated = self.bucket.read_json(f"{prefix}/{MARKER}").get("files")
                if stated == sizes and sizes.items() <= there.items():  # names are random
                    return True
                self.bucket.remove([f"{prefix}/{MARKER}"])
            self.bucket.put_all({links / name: f"{prefix}/{name}" for name in sizes})
            self._check_owner()
            self.bucket.write(f"{prefix}/{MARKER}", _json({"files": sizes}))
        if self.role == TRAIN:
            self._identity["newest"] = step
            self.bucket.write(IDENTITY, _json(self._identity))
        return True

    def _check_owner(self) -> None:
        """Raises Taken."""
        if self.role != TRAIN:
            return
        found = self.bucket.identity().get("session")
        if found != self._identity["session"]:
            raise Taken(
                f"{self.bucket.url}: another `dslt train` has taken this run over, and nothing "
                f"more of this one is sent; what it has learnt lies in {self.path}"
            )

    def pull(self) -> None:
        """Fetches what the trainer has written since; run.json, which may end a wait, last."""
        info = self.bucket.read("run.json")
        listing = self.bucket.find()
        new = {}
        for name, details in listing.items():
            is_wanted = name in ("config.gin", "student.json", "heartbeat.json")
            state = _state(details)
            if (is_wanted or name.startswith("vocabulary/")) and self._pulled.get(name) != state:
                new[name] = state
        self.bucket.get_all({name: self.path / name for name in new})
        self._pulled |= new
        found = self.bucket.checkpoints("checkpoints", listing)
        for step, sizes in sorted(found.items()):
            with contextlib.suppress(FileNotFoundError):  # training has deleted it meanwhile
                pull_checkpoint(
                    self.bucket, self.path, "checkpoints", step, sizes, without=("opt_state",)
                )
        remove_steps(self.path / "checkpoints", keep=found.keys())
        if info is not None:
            write_text(self.path / "run.json", info.decode())


def pull_training(bucket: RunBucket, identity: dict, path: Path) -> None:
    """Fills a directory with what a training needs to go on; only once whole it is at `path`.

    Without a whole checkpoint in the bucket it is empty: the run begins anew.

    Raises:
      InputError: there was a whole checkpoint, and there is none now.
    """
    listing = bucket.find()
    found = bucket.checkpoints("checkpoints", listing)
    partial = steps_of("checkpoints", listing).keys() - found.keys()
    for step in sorted(partial):
        print(f"{bucket.url}/checkpoints/{step}: was not sent whole, and is left out", flush=True)
    if not found and "newest" in identity:
        raise InputError(
            f"{bucket.url}: the checkpoint of step {identity['newest']} was there, and none is "
            "whole now; restore one from a copy, or choose another --run_dir to begin anew"
        )
    scratch = path.with_name(path.name + ".pulling")
    scratch.mkdir(parents=True)
    if found:
        apart = (*_OF_EVALUATION, "checkpoints", "damaged", IDENTITY)
        wanted = [name for name in listing if name.partition("/")[0] not in apart]
        bucket.get_all({name: scratch / name for name in wanted})
        for step, sizes in found.items():
            pull_checkpoint(bucket, scratch, "checkpoints", step, sizes)
    scratch.rename(path)


def pull_evaluations(bucket: RunBucket, path: Path) -> None:
    """Makes what was judged as it is in the bucket, but for what was judged here and not sent."""
    listing, there = bucket.find(), bucket.evaluations()
    own = read_json_rows(path / "evaluations.jsonl")
    unsent = unsent_rows(path, own)
    rows = merge_rows(own, there, unsent)
    names = [name for name in listing if name.startswith("evaluations/")]
    steps = {str(row["step"]) for row in there if row in rows}
    bucket.get_all({name: path / name for name in names if name.split("/")[1] in steps})
    best, found = best_row(rows), bucket.checkpoints("best", listing)
    is_here_alone = best and best["step"] in local_steps(path / "best").keys() - found.keys()
    if best is None or (best in there and not is_here_alone):  # else best/ holds it already
        for step, sizes in found.items():
            with contextlib.suppress(FileNotFoundError):  # a better one has replaced it meanwhile
                pull_checkpoint(bucket, path, "best", step, sizes)
        remove_steps(path / "best", keep=found.keys())
    if rows != own:
        write_json_rows(path / "evaluations.jsonl", rows)
    # last: were it before and a kill between, older rows would seem to be new
    write_json_rows(path.with_name(SENT), [row for row in rows if row not in unsent])


def unsent_rows(path: Path, own: list[dict]) -> list[dict]:
    """Those of the rows of a mirror's evaluations.jsonl that its bucket has not had; without a word
    on that, none.
    """
    sent = path.with_name(SENT)
    known = read_json_rows(sent) if sent.exists() else own
    return [row for row in own if row not in known]


def merge_rows(*lists: list[dict]) -> list[dict]:
    """A row each step, ascending; that of the last list where several have a step."""
    by_step = {row["step"]: row for rows in lists for row in rows}
    return [by_step[step] for step in sorted(by_step)]


def pull_checkpoint(
    bucket: RunBucket,
    path: Path,
    directory: str,
    step: int,
    sizes: dict[str, int],
    without: tuple[str, ...] = (),
) -> None:
    """Fetches a checkpoint, unless it is there; its directory appears whole or not at all.

    Args:
      sizes: of its files.
      without: items that are left in the bucket.

    Raises:
      FileNotFoundError: it is not there any more.
    """
    target = path / directory / str(step)
    wanted = {name: n for name, n in sizes.items() if name.partition("/")[0] not in without}
    if target.is_dir() and _sizes(target) == wanted:  # Orbax's names of files are random
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=SCRATCH) as scratch:
        whole = Path(scratch) / str(step)
        bucket.get_all({f"{directory}/{step}/{name}": whole / name for name in wanted})
        if (found := _sizes(whole)) != wanted:
            raise InputError(
                f"{bucket.url}/{directory}/{step}: found files of {sum(found.values()):,} bytes, "
                f"expected {sum(wanted.values()):,}; start the same command again"
            )
        remove_steps(target.parent, keep=local_steps(target.parent).keys() - {step})
        whole.rename(target)


def steps_of(directory: str, listing: dict[str, dict]) -> dict[int, dict[str, int]]:
    """The steps in a directory of a listing, whole or not: step → file → size."""
    found: dict[int, dict[str, int]] = {}
    for name, details in listing.items():
        first, _, rest = name.partition("/")
        step, _, file = rest.partition("/")
        if first == directory and step.isdigit() and file:
            found.setdefault(int(step), {})[file] = details["size"]
    return found


def local_steps(directory: Path) -> dict[int, tuple[int, int]]:
    """The finished checkpoints in a directory, which Orbax renames when they are whole: step →
    what tells one from a later one of the same step.
    """
    found = {}
    for path in directory.iterdir() if directory.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):
            if path.name.isdigit():
                found[int(path.name)] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def remove_steps(directory: Path, keep) -> None:
    """Deletes pulled checkpoints, copies of what is or was in the bucket."""
    for step in local_steps(directory).keys() - set(keep):
        shutil.rmtree(directory / str(step))


@contextlib.contextmanager
def _synchronised(mirror: Mirror) -> Iterator[None]:
    """Sends and fetches while the block runs, and once more in the end, whatever ended it."""
    mirror.start()
    try:
        yield
    except BaseException:
        with signals.deferred():  # a second signal leaves at once
            try:
                mirror.close()
            except InputError as error:
                print(f"warning: {error}", file=sys.stderr)
        raise
    with signals.deferred():
        mirror.close()


@contextlib.contextmanager
def _locked(bucket: RunBucket, role: str) -> Iterator[None]:
    """Raises InputError where another process of this machine does the same with the bucket."""
    path = bucket.mirror("x").parents[1] / f"{role}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        if not lock_file(file):
            raise InputError(
                f"{bucket.url}: another `dslt {role}` on this machine works on it; wait for it to "
                "end, or stop it"
            )
        yield


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # no hard links here
        shutil.copy2(source, target)


def _sizes(directory: Path) -> dict[str, int]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}


def _state(details: dict) -> str:
    """What changes when objects are written anew, as the store describes them."""
    return json.dumps(details, sort_keys=True, default=str)


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
