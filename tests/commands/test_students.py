"""What lies beside a student and does not fit it."""

import pytest

from dslt.checkpoint import hf_t5
from dslt.core import t5
from dslt.data.vocabulary import ByteVocabulary
from dslt.main import main


@pytest.mark.parametrize("command", ["predict", "export", "serve", "import"])
def test_a_student_with_fewer_embeddings_than_its_vocabulary_has_ids_is_refused(
    command, tmp_path, monkeypatch, capsys
):
    config = t5.T5Config(
        vocab_size=383, d_model=8, d_kv=4, d_ff=8, num_heads=2, num_layers=1, num_decoder_layers=1
    )
    student, output = tmp_path / "student", tmp_path / "output"
    ByteVocabulary().save(tmp_path)
    hf_t5.save(student, config, t5.init_params(config, 0)[1], tmp_path)
    (tmp_path / "inputs.txt").write_text("a\n")
    flags = {"predict": [str(tmp_path / "inputs.txt")], "serve": []}
    flags = flags.get(command, ["--output_dir", str(output)])
    if command == "serve":
        pytest.importorskip("uvicorn")
        monkeypatch.setattr("dslt.serve.serve", lambda *args: None)
    source = "--hugging_face" if command == "import" else "--student"
    assert main([command, source, str(student), *flags]) == 2
    captured = capsys.readouterr()
    assert "has 384 ids" in captured.err and f"{student} embeds 383" in captured.err
    assert not captured.out and not output.exists()
