"""What lies beside a student, whatever its form."""

import sys

from dslt.errors import InputError


def student_files(path) -> tuple:
    """How to speak to the student in `path`, and where its vocabulary lies."""
    from dslt.checkpoint.student import is_checkpoint, is_hugging_face
    from dslt.workdir import RunDir, StudentFormat

    if not path.is_dir():
        raise InputError(
            f"{path}: is no directory; expected a run's, a checkpoint's or a Hugging Face model's"
        )
    if is_hugging_face(path):
        root, vocabulary = path, path
    else:
        root = path.absolute().parent.parent if is_checkpoint(path.absolute()) else path
        vocabulary = RunDir(root).vocabulary
    if RunDir(root).student.exists():
        return StudentFormat.read(RunDir(root).student), vocabulary
    format = StudentFormat()
    print(f"{root}: has no student.json; taking {format}", file=sys.stderr)
    return format, vocabulary
