"""The README's commands exist: each `dslt` line parses, and each file it names is there."""

import re
import shlex
from pathlib import Path

import pytest

from dslt.config import parse
from dslt.main import build_parser

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
LINES = [line.strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("dslt ")])
def test_a_command_parses_and_its_config_builds(line):
    args = build_parser().parse_args(shlex.split(line, comments=True)[1:])
    if args.command == "train":
        configs = parse(args.gin_files, args.gin)
        assert all(binding in configs.text for binding in args.gin if "records" not in binding)


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("bash ")])
def test_a_script_is_there(line):
    assert (ROOT / shlex.split(line, comments=True)[1]).is_file()


def test_the_file_map_names_what_there_is():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "dslt").rglob("*.py"):
        if path.name != "__init__.py":
            assert path.stem in text, f"{path.relative_to(ROOT)} is missing in the README's map"
