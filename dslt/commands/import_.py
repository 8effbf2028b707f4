"""`dslt import`: a Hugging Face T5 as an Orbax checkpoint."""

from pathlib import Path

from dslt.commands.arguments import add_command
from dslt.commands.students import student_files
from dslt.errors import InputError


def add(commands) -> None:
    command = add_command(
        commands, "import", import_student, "turn a Hugging Face T5 into an Orbax checkpoint"
    )
    command.add_argument("--hugging_face", required=True, help="a directory with safetensors")
    command.add_argument("--output_dir", required=True, help="made; must not hold checkpoints")


def import_student(args) -> None:
    """Writes checkpoints/0, the vocabulary and student.json, for `init_from` and `predict`."""
    from dslt.checkpoint import hf_t5
    from dslt.checkpoint.layout import Layout
    from dslt.checkpoint.manager import CheckpointManager
    from dslt.data.vocabulary import load_vocabulary
    from dslt.workdir import RunDir

    source, run = Path(args.hugging_face), RunDir(Path(args.output_dir))
    if run.checkpoints.exists():
        raise InputError(f"{run.checkpoints}: exists already; choose another --output_dir")
    model_config, params = hf_t5.load_params(source)
    format, vocabulary_path = student_files(source)
    vocabulary = load_vocabulary(vocabulary_path)
    with CheckpointManager(run.checkpoints) as manager:
        manager.save_params(0, params, Layout(model_config))
    vocabulary.save(run.vocabulary)
    format.write(run.student)
    print(f"imported {source} to {run.path}")
