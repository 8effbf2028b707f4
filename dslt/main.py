"""The `dslt` command. With commands/ the only files that know argv; they import lazily.

dslt extract --dataset facts --teacher scripted --output_dir runs/facts/records
dslt train runs/step_by_step.gin settings/facts.gin --run_dir runs/facts/step_by_step
dslt evaluate --run_dir runs/facts/step_by_step --follow
dslt export --student runs/facts/step_by_step --output_dir runs/facts/student
dslt predict --student runs/facts/student --rationales problems.txt
dslt serve --student runs/facts/student
dslt plan runs/step_by_step.gin settings/paper.gin --topology v5e:2x4
dslt report runs/facts --output_dir runs/facts/report
"""

import argparse
import os
import re
import sys
import traceback
from collections.abc import Sequence

from dslt import __version__, signals
from dslt.commands import (
    bench,
    evaluate,
    export,
    extract,
    import_,
    plan,
    predict,
    replay,
    report,
    serve,
    sweep,
    train,
)
from dslt.commands.processes import fail, is_distributed
from dslt.errors import InputError
from dslt.files import full_disk_error
from dslt.signals import INTERRUPTED

COMMANDS = (
    *(extract, train, evaluate, predict, serve, export, import_),
    *(sweep, report, bench, plan, replay),
)
RESUMABLE = ("extract", "train", "evaluate", "sweep")  # what is finished is not done again
NVIDIA_DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")  # as JAX looks for them; WSL's
COMPUTING = ("train", "evaluate", "predict", "serve", "bench", "sweep", "replay")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status.

    That is 0, 2 where the input cannot be used, or INTERRUPTED where a signal ended it early.
    """
    parser = build_parser()
    for word in sys.argv[1:] if argv is None else argv:
        if re.search("[\0\ud800-\udfff]", word):  # no file that is written could hold it
            parser.error(f"argument {word!r} is not UTF-8")
    args = parser.parse_args(argv)
    if argv is None:  # a terminal of another encoding is shown escapes
        sys.stdout.reconfigure(errors="backslashreplace")
    if argv is None and args.command in COMPUTING:
        ask_for_huge_pages()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow looks for GPUs, and says so
    if not any(map(os.path.exists, NVIDIA_DEVICES)):  # the compiler alone may be there, for `plan`
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    outlook = signals.GOES_ON if args.command in RESUMABLE else ""
    try:
        with signals.handled(outlook):
            return args.run(args) or 0
    except BrokenPipeError:  # `dslt predict … | head`
        sys.stderr.close()
        return 0
    except InputError as error:
        return fail(args, f"dslt {args.command}: {error}", 2)
    except OSError as error:  # a missing right, a full disk
        where = getattr(args, "run_dir", None) or getattr(args, "output_dir", None) or "."
        message = full_disk_error(error.filename or where, error) or error
        return fail(args, f"dslt {args.command}: {message}", 2)
    except KeyboardInterrupt as signal:
        message = f"dslt {args.command}: stopped on {signal or 'SIGINT'}{outlook}"
        status = fail(args, message, INTERRUPTED)
        if argv is None:
            signals.leave(status)
        return status
    except Exception as error:
        if not is_distributed(args):
            raise
        traceback.print_exc()
        message = f"dslt {args.command}: {type(error).__name__}: {error}"
        if type(error).__name__ == "JaxRuntimeError":  # a broken connection is one
            message += " (where another process has died, its own output says why)"
        return fail(args, message, 1)


def ask_for_huge_pages() -> None:
    """Starts this program again, once, with huge pages for large arrays (Linux, glibc >= 2.35).

    XLA takes the memory of a step's temporaries anew at each step, and its first touch costs a
    fault a page: a fifth of a small model's step on a CPU with pages of 4 kB. Who sets
    GLIBC_TUNABLES decides alone.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def build_parser() -> argparse.ArgumentParser:
    """The command line: one subparser a stage."""
    parser = argparse.ArgumentParser(
        prog="dslt",
        description="Distilling Step-by-Step for T5 on JAX: records → train → evaluate → export.",
    )
    parser.add_argument("--version", action="version", version=f"dslt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
