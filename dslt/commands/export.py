"""`dslt export`: a student in the form of Hugging Face."""

from pathlib import Path

from dslt.commands.arguments import add_command, add_student_flag
from dslt.commands.remote import local_student
from dslt.commands.students import student_files


def add(commands) -> None:
    command = add_command(commands, "export", export, "write a Hugging Face T5 directory")
    add_student_flag(command)
    command.add_argument("--output_dir", required=True, help="made; must not exist or be empty")


def export(args) -> None:
    """Writes safetensors, config, tokenizer, student.json and a model card."""
    import jax

    from dslt.checkpoint import hf_t5, student
    from dslt.core import sharding
    from dslt.data.vocabulary import check_embedded, load_vocabulary
    from dslt.files import write_text
    from dslt.model_card import write_card
    from dslt.workdir import RunDir

    path, output = local_student(args.student), Path(args.output_dir)
    format, vocabulary_path = student_files(path)
    vocabulary = load_vocabulary(vocabulary_path)
    mesh = sharding.make_mesh(sharding.MeshConfig())
    run, step = None, None
    if student.is_hugging_face(path):
        model_config, _, params = student.load(path, mesh)
    else:  # the card is of the one that is read, whatever is saved meanwhile

        def read(checkpoints: Path, step: int) -> tuple:
            return checkpoints, step, student.load(checkpoints / str(step), mesh)

        checkpoints, step, (model_config, _, params) = student.read_checkpoint(path, read)
        run, path = RunDir(checkpoints.parent), checkpoints / str(step)
    check_embedded(vocabulary, vocabulary_path, model_config.vocab_size, path)
    card = write_card(output.name, run, step, format)

    def write_more(directory: Path) -> None:
        format.write(directory / "student.json")
        write_text(directory / "README.md", card)

    hf_t5.save(
        output,
        model_config,
        jax.device_get(params),
        vocabulary_path,
        max_target_tokens=format.max_target_length,
        write_more=write_more,
    )
    print(f"exported {path} to {output}: a Hugging Face T5 directory")
