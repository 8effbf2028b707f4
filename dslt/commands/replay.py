"""`dslt replay`: a step that was not finite, computed again."""

from pathlib import Path

from dslt.commands.arguments import add_command
from dslt.errors import InputError


def add(commands) -> None:
    command = add_command(commands, "replay", replay, "look at a step that was not finite")
    command.add_argument("directory", help="RUN/nonfinite/STEP, as `dslt train` names it")


def replay(args) -> None:
    """Prints the loss, and which parameters and gradients are not finite."""
    from dslt import config, nonfinite
    from dslt.workdir import RunDir

    directory = Path(args.directory).absolute()
    run = RunDir(directory.parent.parent)
    if not run.config.exists():
        raise InputError(f"{args.directory}: lies in no run; expected RUN/nonfinite/STEP")
    for line in nonfinite.replay(directory, config.parse([str(run.config)]).train):
        print(line)
