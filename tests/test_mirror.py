"""A run in a bucket: nothing counts there until it is whole, and nothing goes before it may."""

import json
import os
import shutil
import threading
import time
import uuid

import pytest

from dslt import bucket as buckets
from dslt import mirror
from dslt.bucket import Bucket, hidden, is_url
from dslt.errors import InputError
from dslt.mirror import IDENTITY, MARKER, RunBucket, evaluating, pull_student, training
from dslt.workdir import read_json_rows, write_json_rows

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed (extra `remote`)")
memory = pytest.importorskip("fsspec.implementations.memory")


class Killed(BaseException):
    """Ends what goes on, as a SIGKILL does: nothing of ours handles it."""


class FaultyFileSystem(memory.MemoryFileSystem):
    """A store in memory that all tests share; `before(verb, path)` may raise."""

    protocol = "faulty"
    root_marker = "/"
    before = staticmethod(lambda verb, path: None)

    def put_file(self, lpath, rpath, **settings):
        FaultyFileSystem.before("write", rpath)
        return super().put_file(lpath, rpath, **settings)

    def pipe_file(self, path, value, **settings):
        FaultyFileSystem.before("write", path)
        return super().pipe_file(path, value, **settings)

    def _rm(self, path):
        FaultyFileSystem.before("delete", path)
        return super()._rm(path)

    def rm(self, path, recursive=False, maxdepth=None):
        for each in [path] if isinstance(path, str) else path:
            self._rm(self._strip_protocol(each))

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("faulty://").strip("/")


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)


@pytest.fixture
def url(monkeypatch):
    monkeypatch.setattr(buckets, "RETRY_SECS", (0.0, 0.0))
    monkeypatch.setattr(mirror, "SYNC_SECS", 1000.0)  # a test sends when it says so
    yield f"faulty://bucket/{uuid.uuid4().hex}"
    FaultyFileSystem.before = staticmethod(lambda verb, path: None)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Goes to another machine, or back to one."""

    def go_to(name: str):
        monkeypatch.setenv("DSLT_MIRROR_DIR", str(tmp_path / name))

    go_to("first")
    return go_to


def fail(monkeypatch, before) -> None:
    monkeypatch.setattr(FaultyFileSystem, "before", staticmethod(before))


def save(path, step: int, directory: str = "checkpoints", files: int = 3) -> None:
    """A checkpoint as Orbax leaves it: files of random names, in place by one rename."""
    partial = path / directory / f"{step}.orbax-checkpoint-tmp"
    for item in ("params", "opt_state"):
        (partial / item / "d").mkdir(parents=True)
        for _ in range(files):
            (partial / item / "d" / uuid.uuid4().hex).write_bytes(os.urandom(100))
    partial.rename(path / directory / str(step))


def content(path, *names) -> dict[str, bytes]:
    """What lies in a directory, or in parts of it."""
    found = (p for name in names or ("",) for p in (path / name).rglob("*") if p.is_file())
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in found}


def steps_in(url: str, directory: str = "checkpoints") -> list[int]:
    """The whole checkpoints in the bucket."""
    bucket = RunBucket(url)
    return sorted(bucket.checkpoints(directory, bucket.find()))


def test_a_fresh_machine_gets_what_the_first_had(url, machine):
    with training(url) as path:
        (path / "vocabulary").mkdir()
        (path / "vocabulary/model").write_bytes(b"words")
        (path / "run.json").write_text('{"state": "stopped"}')
        (path / "metrics.jsonl").write_text('{"step": 1}\n')
        for step in (3, 6):
            save(path, step)
        expected = content(path)
    machine("second")
    with training(url) as other:
        assert other != path and content(other) == expected
    machine("first")
    with training(url) as third:  # the second has been here since
        assert third != path and content(third) == expected


def test_the_same_machine_fetches_nothing_and_sends_what_was_left(url, machine, monkeypatch):
    with training(url) as path:
        save(path, 3)

    def refuse(verb, name):
        if verb == "write" and "/6/" in name:
            raise ConnectionError("the network is down")

    fail(monkeypatch, refuse)
    with pytest.raises(InputError, match=r"the network is down.*it is whole in"), training(url):
        save(path, 6)
    assert steps_in(url) == [3]
    written = []
    fail(monkeypatch, lambda verb, name: written.append(name))
    with training(url) as again:
        assert again == path
    assert steps_in(url) == [3, 6] and not any("/3/" in name for name in written)


def test_an_upload_that_fails_twice_is_tried_a_third_time(url, machine, monkeypatch):
    left = {}

    def fail_twice(verb, name):
        if verb == "write" and left.setdefault(name, 2):
            left[name] -= 1
            raise TimeoutError("again")

    fail(monkeypatch, fail_twice)
    with training(url) as path:
        save(path, 3)
    assert steps_in(url) == [3] and len(left) >= 6


@pytest.mark.parametrize("sent", range(8))
def test_a_kill_between_two_files_of_a_checkpoint_leaves_the_one_before(
    sent, url, machine, monkeypatch, capsys
):
    """Six files and the marker: only after all seven is the step there; until then 3 stays, though
    training has deleted it here."""
    with training(url) as path:
        save(path, 3)
        expected = content(path, "checkpoints/3")
    count = []
    lock = threading.Lock()

    def kill(verb, name):
        with lock:
            if "/checkpoints/" in name:
                count.append(name)
                if len(count) > sent:
                    raise Killed

    with pytest.raises(Killed if sent < 8 else ()), training(url) as path:
        save(path, 6)
        new = content(path, "checkpoints/6")
        for file in expected:
            (path / file).unlink()
        for directory in ("params/d", "params", "opt_state/d", "opt_state", ""):
            (path / "checkpoints/3" / directory).rmdir()
        fail(monkeypatch, kill)
    fail(monkeypatch, lambda verb, name: None)
    assert all("/6/" in name and MARKER not in name for name in count[:6])
    assert steps_in(url) == ([3] if sent < 7 else [3, 6])
    machine("second")
    capsys.readouterr()
    with training(url) as other:
        assert content(other, "checkpoints") == (expected if sent < 7 else expected | new)
        said = capsys.readouterr().out
        assert ("checkpoints/6: was not sent whole" in said) == (0 < sent < 7)


def test_an_old_checkpoint_goes_in_the_bucket_after_the_newer_is_whole(
    url, machine, tmp_path, monkeypatch
):
    seen = []
    with training(url) as path:
        save(path, 3)
    fail(monkeypatch, lambda verb, name: seen.append((verb, name.partition(url[8:] + "/")[2])))
    with training(url) as path:
        save(path, 6)
        (path / "checkpoints/3").rename(tmp_path / "deleted")
    assert steps_in(url) == [6]
    order = [name for _, name in seen]
    deleted = [name for verb, name in seen if verb == "delete"]
    assert deleted[0] == f"checkpoints/3/{MARKER}" and len(deleted) == 7
    assert order.index(f"checkpoints/6/{MARKER}") < order.index(deleted[0])
    assert not any("/3/" in name for name in RunBucket(url).find())


def test_a_checkpoint_that_is_deleted_while_it_is_sent_is_sent(url, machine, tmp_path, monkeypatch):
    with training(url) as path:
        save(path, 3)
        expected = content(path, "checkpoints/3")

        lock = threading.Lock()

        def delete(verb, name):
            with lock:
                if "/checkpoints/3/" in name and (path / "checkpoints/3").exists():
                    (path / "checkpoints/3").rename(tmp_path / "deleted")

        fail(monkeypatch, delete)
    machine("second")
    with training(url) as other:
        assert content(other, "checkpoints/3") == expected


def test_nothing_goes_for_a_checkpoint_that_went_before_it_was_sent(
    url, machine, tmp_path, monkeypatch
):
    with training(url) as path:
        save(path, 3)
    with training(url) as path:
        (path / "checkpoints/3").rename(tmp_path / "3")
        save(path, 6)
        (path / "metrics.jsonl").write_text("")

        def delete(verb, name):  # after the look at what is there
            if name.endswith("metrics.jsonl"):
                (path / "checkpoints/6").rename(tmp_path / "6")

        fail(monkeypatch, delete)
    assert steps_in(url) == [3]


def test_the_end_is_said_after_the_last_checkpoint(url, machine, monkeypatch):
    def kill(verb, name):
        if "/checkpoints/" in name:
            raise Killed

    with pytest.raises(Killed), training(url) as path:
        save(path, 3)
        (path / "run.json").write_text('{"state": "finished", "seed": 7}')
        fail(monkeypatch, kill)
    assert RunBucket(url).read_json("run.json") == {"state": "running", "seed": 7}
    fail(monkeypatch, lambda verb, name: None)
    with training(url):
        pass
    assert RunBucket(url).read_json("run.json") == {"state": "finished", "seed": 7}


def test_a_step_that_was_saved_again_is_sent_again(url, machine, tmp_path):
    with training(url) as path:
        save(path, 3)
        save(path, 6)
    with training(url) as path:
        (path / "damaged").mkdir()
        (path / "checkpoints/6").rename(path / "damaged/checkpoints-6")
        save(path, 6)
        expected = content(path)
    assert any(name.startswith("damaged/checkpoints-6/") for name in RunBucket(url).find())
    machine("second")
    with training(url) as other:
        assert (
            content(other, "checkpoints")
            == content(path, "checkpoints")
            == {name: data for name, data in expected.items() if name.startswith("checkpoints/")}
        )


def test_what_a_kill_left_half_way_goes(url, machine):
    with training(url) as path:
        save(path, 3)
    (path.parent / "scratch-1/3").mkdir(parents=True)
    with training(url) as again:
        assert again == path and [p.name for p in path.parent.iterdir()] == [path.name]
    assert steps_in(url) == [3]


def test_a_bucket_that_has_lost_its_checkpoints_does_not_begin_anew(url, machine):
    with training(url) as path:
        save(path, 3)
    bucket = RunBucket(url)
    name = next(name for name in bucket.find() if "/3/params" in name)
    bucket.remove([name])
    machine("second")
    with pytest.raises(InputError, match="step 3 was there, and none is whole now"), training(url):
        pass


def test_files_of_another_are_left_alone(url, machine):
    RunBucket(url).write("checkpoints/3/params/x", b"copied by hand")
    with pytest.raises(InputError, match="holds files that no run with this URL"), training(url):
        pass
    assert list(RunBucket(url).find()) == ["checkpoints/3/params/x"]


def test_a_second_training_on_another_machine_takes_over(url, machine, capsys):
    with pytest.raises(InputError, match="taken this run over"), training(url) as path:
        machine("second")
        with training(url) as other:
            save(path, 3)
            save(other, 5)
    assert steps_in(url) == [5]


def test_a_second_training_on_the_same_machine_is_refused(url, machine):
    with training(url), pytest.raises(InputError, match="another `dslt train`"), training(url):
        pass


def test_an_evaluator_gets_parameters_and_writes_its_own_files_alone(url, machine, monkeypatch):
    monkeypatch.setattr(mirror, "SYNC_SECS", 0.02)
    with pytest.raises(InputError, match="holds no run"), evaluating(url):
        pass
    written = []
    with training(url) as path:
        (path / "config.gin").write_text("config")
        (path / "run.json").write_text('{"state": "running"}')
        save(path, 3)
        machine("second")
        with evaluating(url, follow=True) as other:
            wait_until(lambda: (other / "checkpoints/3").exists())
            save(path, 6)
            (path / "run.json").write_text('{"state": "finished"}')
            # what an evaluator asks: with the end said, the last checkpoint is there
            wait_until(lambda: "finished" in read(other / "run.json"))
            assert content(other, "checkpoints/6") == content(path, "checkpoints/6/params")
            fail(monkeypatch, lambda verb, name: written.append(name.partition(url[8:] + "/")[2]))
            save(other, 6, "best")
            (other / "evaluations/6").mkdir(parents=True)
            (other / "evaluations/6/metrics.json").write_text("{}")
            (other / "evaluations.jsonl").write_text('{"step": 6}\n')
    own = [name for name in written if not name.startswith(("heartbeat", IDENTITY))]
    assert {name.partition("/")[0] for name in own} == {"evaluations", "best", "evaluations.jsonl"}
    assert own[-1] == "evaluations.jsonl" and steps_in(url, "best") == [6]
    machine("third")
    assert content(pull_student(url), "best") == content(other, "best/6/params")
    assert content(pull_student(f"{url}/checkpoints/3")) == {
        name.removeprefix("checkpoints/3/"): data
        for name, data in content(path, "checkpoints/3/params").items()
    }


def save_best(path, step: int) -> None:
    shutil.rmtree(path / "best", ignore_errors=True)
    save(path, step, "best")


def judge(path, step: int, accuracy: float, is_best: bool = False) -> None:
    """What `dslt evaluate` leaves of a step, its row last."""
    if is_best:
        save_best(path, step)
    predictions = path / "evaluations" / str(step) / "predictions.jsonl"
    predictions.parent.mkdir(parents=True, exist_ok=True)
    predictions.write_text(f"{accuracy}\n")
    rows = [row for row in read_json_rows(path / "evaluations.jsonl") if row["step"] != step]
    rows.append({"step": step, "validation/accuracy": accuracy})
    write_json_rows(path / "evaluations.jsonl", rows)


def judged_in(url: str) -> dict[int, float]:
    return {row["step"]: row["validation/accuracy"] for row in RunBucket(url).evaluations()}


def refuse(verb, name):
    raise ConnectionError("the network is down")


def test_evaluations_that_could_not_be_sent_are_sent_the_next_time(url, machine, monkeypatch):
    with training(url):
        pass
    with evaluating(url) as path:
        judge(path, 2, 0.2)
    with pytest.raises(InputError, match="the same command"), evaluating(url) as path:
        judge(path, 4, 0.4, is_best=True)
        fail(monkeypatch, refuse)
    fail(monkeypatch, lambda verb, name: None)
    machine("second")
    with evaluating(url) as path:
        judge(path, 6, 0.1)
    machine("first")
    with evaluating(url):
        pass
    assert judged_in(url) == {2: 0.2, 4: 0.4, 6: 0.1} and steps_in(url, "best") == [4]


@pytest.mark.parametrize(("again", "best"), [(0.1, 4), (0.5, 2)])
def test_a_step_judged_again_that_could_not_be_sent_counts(again, best, url, machine, monkeypatch):
    """The bucket's row and predictions of it are older, and its best may be another now."""
    with training(url):
        pass
    with evaluating(url) as path:
        judge(path, 2, 0.4, is_best=True)
        judge(path, 4, 0.3)
    with pytest.raises(InputError, match="the same command"), evaluating(url) as path:
        judge(path, 2, again)
        save_best(path, best)
        fail(monkeypatch, refuse)
    kept = content(path, "best")
    fail(monkeypatch, lambda verb, name: None)
    with evaluating(url):
        assert content(path, "best") == kept
    assert judged_in(url) == {2: again, 4: 0.3} and steps_in(url, "best") == [best]
    assert RunBucket(url).read("evaluations/2/predictions.jsonl") == f"{again}\n".encode()


@pytest.mark.parametrize("is_marked", [True, False])
def test_a_step_that_another_machine_judged_again_counts(is_marked, url, machine):
    """Over what this one had sent before, at its end and its start; so where nothing is known."""
    with training(url):
        pass
    with evaluating(url) as path:
        judge(path, 2, 0.2)
    with evaluating(url) as path:
        judge(path, 4, 0.4)
        machine("second")
        with evaluating(url) as other:
            judge(other, 2, 0.3)
    assert judged_in(url) == {2: 0.3, 4: 0.4}
    machine("first")
    if not is_marked:
        path.with_name(mirror.SENT).unlink()
    with evaluating(url):
        assert [
            row["validation/accuracy"] for row in read_json_rows(path / "evaluations.jsonl")
        ] == [0.3, 0.4]
    assert judged_in(url) == {2: 0.3, 4: 0.4}


def test_a_machine_that_comes_back_takes_the_best_from_the_bucket(url, machine):
    with training(url):
        pass
    with evaluating(url) as path:
        judge(path, 2, 0.2, is_best=True)
    machine("second")
    with evaluating(url) as other:
        assert content(other, "best") == content(path, "best")
        judge(other, 4, 0.4, is_best=True)
        (other / "evaluations/2/predictions.jsonl").write_text("judged again\n")
    machine("first")
    with evaluating(url) as again:
        assert again == path and content(path, "best") == content(other, "best")
        judge(path, 6, 0.1)
    assert judged_in(url) == {2: 0.2, 4: 0.4, 6: 0.1} and steps_in(url, "best") == [4]
    assert RunBucket(url).read("evaluations/2/predictions.jsonl") == b"judged again\n"


@pytest.mark.parametrize(("first", "second"), [(2, 4), (4, 2)])
def test_a_best_that_another_machine_sends_meanwhile_stays(first, second, url, machine):
    with training(url):
        pass
    with evaluating(url) as path:
        machine("second")
        with evaluating(url) as other:
            judge(other, second, 0.4, is_best=True)
        judge(path, first, 0.2, is_best=True)
    assert judged_in(url) == {first: 0.2, second: 0.4} and steps_in(url, "best") == [second]


def read(path) -> str:
    return path.read_text() if path.exists() else ""


def wait_until(is_so, secs: float = 20.0) -> None:
    until = time.monotonic() + secs
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_hugging_face_directory_is_fetched_once_and_again_when_it_changes(url, machine):
    bucket = RunBucket(url)
    bucket.write("config.json", b"{}")
    bucket.write("model-1.safetensors", b"old")
    first = pull_student(url)
    assert content(first) == {"config.json": b"{}", "model-1.safetensors": b"old"}
    assert pull_student(url) == first
    bucket.remove(["model-1.safetensors"])
    bucket.write("model.safetensors", b"new")
    assert content(pull_student(url)) == {"config.json": b"{}", "model.safetensors": b"new"}


@pytest.mark.parametrize("name", ["../x", "vocabulary/../../x", "a//b"])
def test_an_object_outside_of_the_run_is_refused(name, url, machine, monkeypatch):
    with training(url):
        pass
    root = "/" + url.removeprefix("faulty://")
    found = {f"{root}/{IDENTITY}": {"size": 1}, f"{root}/{name}": {"size": 1}}
    monkeypatch.setattr(FaultyFileSystem, "find", lambda *_, **__: found)
    for reader in (lambda: pull_student(url), evaluating(url).__enter__):
        with pytest.raises(InputError, match="which is no file's name"):
            reader()


def test_two_processes_may_fetch_the_same_hugging_face_directory_at_once(url, machine, monkeypatch):
    RunBucket(url).write("config.json", b"{}")
    get_all, others = RunBucket.get_all, []

    def get_all_second(self, files):
        get_all(self, files)
        monkeypatch.setattr(RunBucket, "get_all", get_all)
        others.append(pull_student(url))

    monkeypatch.setattr(RunBucket, "get_all", get_all_second)
    path = pull_student(url)
    assert others == [path] == list(path.parent.iterdir())
    assert content(path) == {"config.json": b"{}"}


def test_an_identity_that_names_another_place_is_refused(url, machine):
    RunBucket(url).write(IDENTITY, json.dumps({"run": "../../x", "session": "y"}).encode())
    with pytest.raises(InputError, match="is not what `dslt train` writes"), training(url):
        pass


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("nix://key:secret@bucket/run", r"nix://\*\*\*@bucket/run: .*not known.*pip install"),
        ("faulty://key:secret@bucket/run", r"^faulty://\*\*\*@bucket/run/mirror.json: cannot read"),
        ("faulty://key:SECRET/secret@bucket/run", r"^faulty://\*\*\*@bucket/run/mirror.json: "),
        ("faulty://bucket/run?sig=a/secret", r"^faulty://bucket/run\?\*\*\*/mirror.json: cannot"),
    ],
)
def test_no_error_shows_the_credentials_in_a_url(given, says, url, machine, monkeypatch):
    def refuse(self, path, **_):
        key = given.partition("//")[2].partition("@bucket")[0]
        raise PermissionError(f"not allowed: {given} {path} with {key} or {key[4:]}")

    monkeypatch.setattr(FaultyFileSystem, "cat_file", refuse)
    with pytest.raises(InputError, match=says) as error, training(given):
        pass
    assert "secret" not in str(error.value).lower()


@pytest.mark.parametrize(
    "shown", ["https://host:8080/a@b/c:d", "gs://bucket/run@2", "file:///tmp/a:b@c", "what? a@b"]
)
def test_what_is_no_credential_is_shown(shown):
    assert hidden(shown) == shown


def test_a_mirror_is_of_one_url_whatever_its_credentials():
    first, *others = (
        Bucket(f"memory://{place}").mirror("x")
        for place in ("b/run?at=a/1", "b/run?at=2", "c/run?at=a/1", "b/run")
    )
    assert first not in others and first.name == "run"
    of_keys = [Bucket(f"memory://{key}@b/run").mirror("x") for key in ("a:b", "a:c/d")]
    assert of_keys[0].parent == of_keys[1].parent


def test_a_package_that_is_missing_is_named(url, monkeypatch):
    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(InputError, match=r"Install s3fs.*s3fs for s3://"):
        RunBucket("s3://bucket/run")
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(InputError, match=r"pip install 'dslt\[remote\]'"):
        RunBucket("s3://bucket/run")


@pytest.mark.parametrize("path", ["runs/x", "/runs/x", "a:b/c", "C:/x", "./gs://x"])
def test_a_plain_path_is_no_url(path):
    assert not is_url(path) and is_url("gs://bucket/run")
