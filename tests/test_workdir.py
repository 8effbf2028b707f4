"""What a run's directory holds, and that a resumed run's metrics have each step once."""

import json
from pathlib import Path

import pytest

from dslt.errors import InputError
from dslt.workdir import (
    MetricsWriter,
    RunDir,
    StudentFormat,
    _records,
    environment,
    read_config,
    read_json_rows,
)

NO_ROWS = ('{"step": "4"}', '{"step": true}', '{"step": 4, "validation/accuracy": "0.5"}')


def test_a_resumed_run_rewrites_the_rows_after_its_checkpoint(tmp_path):
    run = RunDir(tmp_path)
    writer = MetricsWriter(run, first_step=1)
    for step in (1, 2, 3):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with run.metrics.open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a kill
    writer = MetricsWriter(run, first_step=3)
    writer.write(3, {"loss": 30.0})
    writer.close()
    assert read_json_rows(run.metrics) == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 30.0},
    ]


@pytest.mark.parametrize("place", ["length", "event", "end"])
def test_a_damaged_event_file_is_cut_and_set_aside_as_it_was(place, tmp_path, capsys):
    run = RunDir(tmp_path)
    writer = MetricsWriter(run, first_step=1)
    for step in range(1, 5):
        writer.write(step, {"loss": float(step)})
    writer.close()
    [path] = run.path.glob("events*")
    whole = path.read_bytes()
    records = [record for record, _ in _records(whole)]
    start = sum(map(len, records[:3]))  # the file's version and two steps stand before
    if place == "end":  # as a kill leaves it
        path.write_bytes(whole[:-20])
    else:
        first = start + (0 if place == "length" else 12)
        path.write_bytes(whole[:first] + b"\xff" * 8 + whole[first + 8 :])
    damaged = path.read_bytes()
    MetricsWriter(run, first_step=5).close()
    asides = list(run.path.glob("*damaged*"))
    if place == "end":
        assert path.read_bytes() == b"".join(records[:4]) and not asides
        assert capsys.readouterr().err == ""
    else:
        assert path.read_bytes() == whole[:start]
        assert [aside.read_bytes() for aside in asides] == [damaged]
        assert "tfevents" not in asides[0].name
        assert f"{path}: is damaged: what stands from byte {start:,}" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://bucket/run"])
def test_a_buckets_address_is_no_directory(path):
    """A directory `gs:` would be made here, and nothing would be in the bucket."""
    with pytest.raises(InputError, match=f"^{path}: a run's directory is a plain path; mount"):
        RunDir(Path(path))
    assert RunDir(Path("a/gs:/x")).path == Path("a/gs:/x")


def test_info_keeps_the_fields_that_are_not_set_again(tmp_path):
    run = RunDir(tmp_path / "run")
    assert run.state() is None
    run.update_info(state="running", seed=3)
    run.update_info(state="finished")
    assert run.state() == "finished" and '"seed": 3' in run.info.read_text()


def test_a_config_is_read_without_gin_and_without_running_it(tmp_path):
    path = tmp_path / "config.gin"
    path.write_text(
        "import os\n"
        "a.B.lines = \\\n    ('x',\n     'y')\n"
        "a.B.number = -1.5e-3\n"
        "a.B.reference = @os.system\n"
        "a.B.call = __import__('os').system('touch /tmp/x')\n"
        "a.B.last = None\n"
    )
    assert read_config(path) == {"a.B.lines": ("x", "y"), "a.B.number": -0.0015, "a.B.last": None}


def test_only_a_numbered_directory_is_a_checkpoint(tmp_path):
    run = RunDir(tmp_path)
    assert not run.has_checkpoints()
    (run.checkpoints / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    assert not run.has_checkpoints()
    (run.checkpoints / "5").mkdir()
    assert run.has_checkpoints()


def test_a_student_format_survives_its_file_and_refuses_another(tmp_path):
    path = tmp_path / "student.json"
    format = StudentFormat("a: ", "b: ", 7, 8)
    format.write(path)
    assert StudentFormat.read(path) == format
    path.write_text('{"input_prefix": "x"}')
    with pytest.raises(InputError, match=r"found the fields \['input_prefix'\], expected"):
        StudentFormat.read(path)
    path.write_text("[")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        StudentFormat.read(path)


def test_the_environment_names_the_versions_that_a_result_depends_on():
    assert {"jax", "flax", "optax", "orbax-checkpoint"} <= environment()["versions"].keys()


@pytest.mark.parametrize("line", ["{", "[]", "1", "{}", '"a"', "[" * 10_000, "\xff", *NO_ROWS])
def test_a_damaged_row_is_named(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line.encode("latin-1") + b'\n{"st')
    with pytest.raises(InputError, match=r"metrics.jsonl:2: is no row"):
        read_json_rows(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"input_prefix_label": 1},
        {"max_input_length": "9"},
        {"max_input_length": True},
        {"max_target_length": 1},
        {"rationale_start_id": -1},
        {"other": 1},
    ],
)
def test_a_student_is_spoken_to_by_fields_of_the_right_kind(fields, tmp_path):
    (tmp_path / "student.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=next(iter(fields))):
        StudentFormat.read(tmp_path / "student.json")
