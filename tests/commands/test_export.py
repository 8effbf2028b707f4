"""`dslt export` while its run goes on."""

import pytest

from dslt.checkpoint import hf_t5, student
from dslt.checkpoint.layout import Layout
from dslt.checkpoint.manager import CheckpointManager
from dslt.core import t5
from dslt.data.vocabulary import ByteVocabulary
from dslt.main import main


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
