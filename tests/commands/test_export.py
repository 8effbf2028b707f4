"""`dslt export` while its run goes on; an export or import that is cut off."""

import shutil

import jax
import numpy as np
import pytest

from dslt.checkpoint import hf_t5, student
from dslt.checkpoint.layout import Layout
from dslt.checkpoint.manager import CheckpointManager
from dslt.core import t5
from dslt.core.sharding import MeshConfig, make_mesh
from dslt.data.vocabulary import ByteVocabulary
from dslt.main import main
from dslt.workdir import StudentFormat, write_json_rows


@pytest.fixture
def run(tmp_path):
    """A run's directory with checkpoint 0 alone."""
    config = t5.T5Config(
        vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=1, num_decoder_layers=1
    )  # fmt: skip
    ByteVocabulary().save(tmp_path / "vocabulary")
    _, params = t5.init_params(config, 0)
    hf_t5.save(tmp_path / "hf", config, params, tmp_path / "vocabulary")
    flags = ["--hugging_face", str(tmp_path / "hf"), "--output_dir", str(tmp_path / "run")]
    assert main(["import", *flags]) == 0
    return tmp_path / "run"


@pytest.mark.parametrize("place", [CheckpointManager, ByteVocabulary, StudentFormat])
def test_an_import_that_was_cut_off_is_made_anew_and_a_whole_one_stays(
    place, run, tmp_path, monkeypatch, capsys
):
    args = ["import", "--hugging_face", str(tmp_path / "hf"), "--output_dir", str(tmp_path / "to")]

    def fail(*_):
        raise KeyboardInterrupt("SIGTERM")

    with monkeypatch.context() as patch:
        name = {CheckpointManager: "save_params", ByteVocabulary: "save", StudentFormat: "write"}
        patch.setattr(place, name[place], fail)
        assert main(args) == 130
    assert main(args) == 0
    capsys.readouterr()
    assert main(args) == 2
    assert f"{tmp_path / 'to'}: holds a run or a checkpoint" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "to/checkpoints")
    (tmp_path / "to/run.json").write_text("{}")
    assert main(args) == 2


def test_the_card_is_of_the_checkpoint_that_was_exported_though_others_are_saved_meanwhile(
    run, tmp_path, monkeypatch
):
    load, loaded = student.load, []
    config, params = hf_t5.load_params(tmp_path / "hf")

    def save(step):
        with CheckpointManager(run / "checkpoints") as manager:
            manager.save_params(step, params, Layout(config))

    def load_while_training(path, mesh):
        save(1)
        loaded.append(student.find_checkpoint(path)[1])
        found = load(path, mesh)
        save(2)
        return found

    monkeypatch.setattr(student, "load", load_while_training)
    output = tmp_path / "student"
    assert main(["export", "--student", str(run), "--output_dir", str(output)]) == 0
    assert student.find_checkpoint(run)[1] == 2
    assert f"| checkpoint | step {loaded[0]} |" in (output / "README.md").read_text()


def test_an_export_has_all_its_files_or_is_none(run, tmp_path, monkeypatch, capsys):
    output = tmp_path / "student"
    args = ["export", "--student", str(run), "--output_dir", str(output)]

    def fail(*_):
        raise OSError("no")

    with monkeypatch.context() as patch:
        patch.setattr(StudentFormat, "write", fail)
        assert main(args) == 2
    assert not output.exists()
    row = {"step": 0, "test/accuracy": 0.5, "validation/accuracy": 1.0}
    write_json_rows(run / "evaluations.jsonl", [row | {"test/standard_error": 0.1}])
    assert main(args) == 0
    assert "Accuracy: unknown" in (output / "README.md").read_text()
    assert StudentFormat.read(output / "student.json") == StudentFormat()


@pytest.mark.parametrize("when", ["check_params", "load", "_read_to_host"])
def test_a_best_that_is_replaced_while_it_is_read_gives_way_to_the_new_one(
    when, run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(student, "DELETION_SECS", 0.0)
    config, params = hf_t5.load_params(tmp_path / "hf")
    layout, function = Layout(config), getattr(student, when)
    with CheckpointManager(run / "best") as manager:
        manager.save_params(2, params, layout)

    def replace_and_call(*args):
        if (run / "best/2").exists():
            with CheckpointManager(run / "best") as manager:
                manager.replace_all(4, params, layout)
        return function(*args)

    monkeypatch.setattr(student, when, replace_and_call)
    output = tmp_path / "student"
    assert main(["export", "--student", str(run), "--output_dir", str(output)]) == 0
    said = capsys.readouterr()
    assert f"exported {run / 'best/4'} to" in said.out and "damaged" not in said.err
    assert "| checkpoint | step 4 |" in (output / "README.md").read_text()


def test_a_student_that_is_replaced_before_it_is_loaded_is_found_again(run, tmp_path, monkeypatch):
    monkeypatch.setattr(student, "DELETION_SECS", 0.0)
    config, params = hf_t5.load_params(tmp_path / "hf")
    with CheckpointManager(run / "checkpoints") as manager:
        manager.save_params(1, params, Layout(config))
    read = student._read_to_host

    def delete_and_read(directory, step):
        if step == 1:
            shutil.rmtree(directory / "1")
        return read(directory, step)

    monkeypatch.setattr(student, "_read_to_host", delete_and_read)
    _, _, found = student.load_to_host(run, make_mesh(MeshConfig()))
    assert not (run / "checkpoints/1").exists()
    jax.tree.map(np.testing.assert_array_equal, found, params)
