"""`dslt report`: run directories → a page, Markdown and CSV."""

import importlib.util
from pathlib import Path

from dslt.commands.arguments import add_command
from dslt.errors import InputError

NEEDED = ("jinja2", "matplotlib", "rouge_score", "sacrebleu", "scipy")


def add(commands) -> None:
    command = add_command(commands, "report", report, "compare runs: one HTML page, Markdown, CSV")
    command.add_argument("paths", nargs="+", help="runs, or directories that hold runs")
    command.add_argument(
        "--output_dir", required=True, help="made; files of its names are replaced"
    )
    command.add_argument(
        "--reference",
        help="the method that others are compared with, as the page calls it; without it "
        "fine-tuning, else distillation",
    )


def report(args) -> None:
    """Prints what was compared, what was not, and where the page lies."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"dslt report needs {', '.join(missing)}; install the extra: pip install '.[report]'"
        )
    from dslt.report.page import write_report

    output = Path(args.output_dir)
    found = write_report([Path(path) for path in args.paths], output, args.reference)
    for sentence in found.findings:
        print(sentence)
    for name, reason in found.left_out:
        print(f"left out: {name}: {reason}")
    print(f"{len(found.runs)} runs: {output / 'index.html'}")
