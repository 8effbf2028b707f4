"""What the subcommands' arguments share."""

import argparse
import dataclasses
import math

from dslt.errors import InputError


def add_command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    """A subcommand whose help begins with `text`."""
    command = commands.add_parser(
        name,
        help=text,
        description=text,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def add_gin_flag(command, example: str = "train.TrainConfig.rationale_weight = 0.5") -> None:
    command.add_argument(
        "--gin",
        action="append",
        default=[],
        metavar="BINDING",
        help=f"an override such as {example!r}; may be repeated",
    )


def add_student_flag(command) -> None:
    command.add_argument(
        "--student",
        required=True,
        help="a run's directory (its best checkpoint), one checkpoint, or a Hugging Face "
        "directory; or the URL of one, such as gs://bucket/run",
    )


def positive(text: str) -> int:
    """An argparse type."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def natural(text: str) -> int:
    """An argparse type: 0 or more."""
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


def positive_float(text: str) -> float:
    """An argparse type: more than 0, and finite."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


def share(text: str) -> float:
    """An argparse type: more than 0, and at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError(text)
    return value


def fields_of(args, config_class: type) -> dict:
    """The arguments that are named as fields of a dataclass."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return {name: value for name, value in vars(args).items() if name in names}


def require(args, name: str) -> str:
    """A flag that the other flags make necessary."""
    value = getattr(args, name)
    if value is None:
        raise InputError(f"--{name} is missing; --teacher {args.teacher} needs it")
    return value
