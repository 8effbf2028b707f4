"""Flags of the subcommands that run in several processes, and how those end."""

import os
import sys

from dslt.commands.arguments import positive
from dslt.errors import InputError
from dslt.terminal import printable

# Flags that may be left to the environment, so that the command is the same on every worker.
PROCESS_VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}


def add_process_flags(command) -> None:
    group = command.add_argument_group(
        "several processes",
        "One command on every worker. It runs in one process unless one of these flags, or "
        f"{PROCESS_VARIABLES['coordinator']} in the environment, asks for several.",
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="find the others by the environment: a Cloud TPU pod, Slurm or Open MPI; or, in place "
        f"of the flags below, {', '.join(PROCESS_VARIABLES.values())}",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--num_processes", type=positive, metavar="N")
    group.add_argument("--process_id", type=int, metavar="I", help="of this process, from 0")
    group.add_argument(
        "--start_timeout_secs", type=positive, default=300, help="until all workers have come"
    )


def start_processes(args) -> None:
    """Joins the other processes if there are to be several. Raises InputError."""
    if not is_distributed(args):
        return
    found = {}
    for flag, variable in PROCESS_VARIABLES.items():
        value = getattr(args, flag)
        found[flag] = os.environ.get(variable) if value is None else value
        if found[flag] is not None and flag != "coordinator":
            try:
                found[flag] = int(found[flag])
            except ValueError:
                raise InputError(f"{variable} is {found[flag]!r}; expected a number") from None
    from dslt import distributed

    distributed.initialize(**found, timeout_secs=args.start_timeout_secs)


def is_distributed(args) -> bool:
    """Whether the flags or the environment ask for several processes."""
    if not hasattr(args, "distributed"):  # a stage for one process
        return False
    flags = (args.coordinator, args.num_processes, args.process_id)
    has_flag = args.distributed or any(flag is not None for flag in flags)
    return has_flag or PROCESS_VARIABLES["coordinator"] in os.environ


def fail(args, message: str, status: int) -> int:
    """Prints the message and returns the status; of several processes, ends them all."""
    if is_distributed(args):
        from dslt import distributed

        distributed.fail(message, status)
    if message:
        print(printable(message), file=sys.stderr)
    return status
