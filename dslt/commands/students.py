"""What lies beside a student, whatever its form."""

import dataclasses
import functools
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


def answer_reader(config, target_layout: str, max_target_length: int) -> tuple:
    """An EvalConfig for a student's target layout, and what finds the label in a decoded answer.

    Where label and rationale are one target, an answer may be as long as a target.

    Raises:
      InputError: the config asks for what such a student cannot do.
    """
    from dslt.data.target_layout import LABEL, label_of

    if target_layout == LABEL:
        return config, str
    if config.answers != "open" or config.with_rationales:
        asked = "rationales" if config.with_rationales else f"answers {config.answers!r}"
        raise InputError(
            f"{asked} asked of a student that was trained with target_layout {target_layout!r}: "
            "its answers hold label and rationale in one text; expected answers 'open' and no "
            "rationales apart"
        )
    length = max(config.max_label_length, max_target_length)
    reader = functools.partial(label_of, layout=target_layout)
    return dataclasses.replace(config, max_label_length=length), reader
