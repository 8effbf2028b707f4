"""What lies beside a student, whatever its form, and what it may answer."""

import dataclasses
import functools
import sys
from collections.abc import Sequence

from dslt.errors import InputError


def student_files(path) -> tuple:
    """How to speak to the student in `path`, and where its vocabulary lies."""
    from dslt.workdir import RunDir, StudentFormat

    if not path.is_dir():
        raise InputError(
            f"{path}: is no directory; expected a run's, a checkpoint's or a Hugging Face model's"
        )
    root, vocabulary = find_root(path)
    if RunDir(root).student.exists():
        return StudentFormat.read(RunDir(root).student), vocabulary
    format = StudentFormat()
    print(f"{root}: has no student.json; taking {format}", file=sys.stderr)
    return format, vocabulary


def find_root(path) -> tuple:
    """The directory that student.json is in, and the vocabulary's, for the student in `path`."""
    from dslt.checkpoint.student import is_checkpoint, is_hugging_face
    from dslt.workdir import RunDir

    if is_hugging_face(path):
        return path, path
    root = path.absolute().parent.parent if is_checkpoint(path.absolute()) else path
    return root, RunDir(root).vocabulary


def check_start(path, vocabulary, name: str) -> None:
    """Raises InputError where the parameters in `path` are of another vocabulary than this one.

    Where no vocabulary lies beside them, a line says that it cannot be known.
    """
    from dslt.data.vocabulary import has_same_pieces, load_vocabulary

    if not path.is_dir():
        return  # who reads the parameters says so
    beside = find_root(path)[1]
    try:
        expected = load_vocabulary(beside)
    except InputError as error:
        print(f"warning: whether {path} is of the vocabulary {name!r} is not known: {error}")
        return
    if not has_same_pieces(vocabulary, expected):
        raise InputError(
            f"the vocabulary is {name!r}, but the parameters in {path} are of another, whose ids "
            f"mean other pieces; expected pipeline.DataConfig.vocabulary = {str(beside)!r}, or "
            "another train.TrainConfig.init_from"
        )


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


def make_answer_sets(
    inputs: Sequence[tuple[str, str]], config, vocabulary, is_strict: bool = False
) -> list:
    """What each input may be answered with: the config's labels, or the choices that it lists.

    Of an input's own choices that are the same tokens to the student, the first stands for all, and
    how many inputs have such is said.

    Args:
      inputs: how an error calls each, and its text.
      is_strict: refuses such choices.

    Raises:
      InputError: an input has no answers to choose from, an answer is too long, or a label is blank
        or the same tokens as another one.
    """
    from dslt.core.answers import AnswerSet
    from dslt.core.batch import EOS_ID
    from dslt.teacher.parse import choices_in

    blank = [label for label in config.labels if not label.strip()]
    if blank:
        raise InputError(f"the label {blank[0]!r} is blank; expected text")
    sets: dict[tuple[str, ...], AnswerSet] = {}
    chosen, num_alike = [], 0
    for name, text in inputs:
        texts = tuple(dict.fromkeys(config.labels or choices_in(text)))
        if not texts:
            raise InputError(
                f"{name}: answers is {config.answers!r}, but its text lists no `Answer Choices:`; "
                "give the labels to choose from, or let answers be 'open'"
            )
        if texts not in sets:
            text_of: dict[tuple[int, ...], str] = {}
            for answer in texts:
                ids = (*vocabulary.encode(answer), EOS_ID)
                first = text_of.setdefault(ids, answer)
                if first != answer and (config.labels or is_strict):
                    whose = "the labels" if config.labels else f"{name}: the choices"
                    raise InputError(
                        f"{whose} {first!r} and {answer!r} are the same tokens to this student, "
                        "which could never answer the second; expected texts that its vocabulary "
                        "tells apart. Give other words, or leave one out"
                    )
                if len(ids) > config.max_label_length:
                    raise InputError(
                        f"{name}: the answer {answer!r} has {len(ids)} tokens; expected at most "
                        f"max_label_length = {config.max_label_length}"
                    )
            sets[texts] = AnswerSet(tuple(text_of.values()), tuple(text_of))
        chosen.append(sets[texts])
        num_alike += len(sets[texts].texts) < len(texts)
    if num_alike:
        print(
            f"warning: {num_alike} of {len(inputs)} inputs list choices that are the same tokens "
            "to this student; of these it answers with the first",
            file=sys.stderr,
        )
    return chosen
