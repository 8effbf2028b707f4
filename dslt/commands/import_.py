"""`dslt import`: a Hugging Face T5 or a T5X checkpoint as an Orbax checkpoint."""

import sys
from pathlib import Path

from dslt.commands.arguments import add_command
from dslt.commands.students import student_files
from dslt.errors import InputError


def add(commands) -> None:
    command = add_command(
        commands,
        "import",
        import_student,
        "turn a Hugging Face T5 or a T5X checkpoint into an Orbax checkpoint",
    )
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--hugging_face", help="a directory with safetensors")
    source.add_argument("--t5x", help="a checkpoint's directory, such as checkpoint_1000000")
    command.add_argument(
        "--vocabulary",
        help="with --t5x, which has none: a SentencePiece model, a tokenizer's directory, or bytes",
    )
    command.add_argument("--output_dir", required=True, help="made; must not hold checkpoints")


def import_student(args) -> None:
    """Writes checkpoints/0, the vocabulary and student.json, for `init_from` and `predict`."""
    from dslt.checkpoint import hf_t5, t5x
    from dslt.checkpoint.layout import Layout
    from dslt.checkpoint.manager import CheckpointManager, finished_steps
    from dslt.data.vocabulary import check_embedded, load_vocabulary
    from dslt.workdir import RunDir, StudentFormat

    run = RunDir(Path(args.output_dir))
    if run.info.exists() or finished_steps(run.checkpoints):  # an import cut off has neither
        raise InputError(f"{run.path}: holds a run or a checkpoint; choose another --output_dir")
    if bool(args.t5x) != bool(args.vocabulary):
        raise InputError(
            "--t5x and --vocabulary go together: a T5X checkpoint has no vocabulary, and a "
            "Hugging Face directory has its own"
        )
    if args.t5x:
        source = Path(args.t5x)
        vocabulary = load_vocabulary(args.vocabulary)
        model_config, params = t5x.load_params(source)
        format = StudentFormat()
        print(f"{source}: says nothing of its inputs; taking {format}", file=sys.stderr)
    else:
        source = Path(args.hugging_face)
        model_config, params = hf_t5.load_params(source)
        format, vocabulary_path = student_files(source)
        vocabulary = load_vocabulary(vocabulary_path)
    check_embedded(vocabulary, args.vocabulary or source, model_config.vocab_size, source)
    vocabulary.save(run.vocabulary)
    format.write(run.student)
    with CheckpointManager(run.checkpoints) as manager:  # last: it says that the import is whole
        manager.save_params(0, params, Layout(model_config))
    print(f"imported {source} to {run.path}")
