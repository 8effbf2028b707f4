"""launch/setup_venv.sh with a stand-in for pip: what was not installed is not taken for it."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose environment exists; its pip ends as the file `pip_status` says."""
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "setup_venv.sh", tmp_path / "launch")
    (tmp_path / "setup.py").write_text("# as it is now\n")
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text('PATH="$PWD/.venv/bin:$PATH"\n')
    for name in ("pip", "python"):
        (programs / name).write_text('#!/usr/bin/env bash\nexit "$(<pip_status)"\n')
        (programs / name).chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    "script",
    [
        "set -euo pipefail; source launch/setup_venv.sh; echo goes on",
        "source launch/setup_venv.sh || exit; echo goes on",
        "source launch/setup_venv.sh && echo goes on",
    ],
)
def test_an_install_that_failed_is_done_again(checkout, script):
    def run(pip_status):
        (checkout / "pip_status").write_text(f"{pip_status}\n")
        return subprocess.run(["bash", "-c", script], cwd=checkout, capture_output=True, text=True)

    failed = run(3)
    assert failed.returncode == 3 and "goes on" not in failed.stdout
    done = run(0)
    assert done.returncode == 0 and done.stdout.startswith("installing dslt"), done.stderr
    again = run(3)
    assert (again.returncode, again.stdout) == (0, "goes on\n")


def test_it_is_no_script_of_its_own(checkout):
    script = ["bash", "launch/setup_venv.sh"]
    found = subprocess.run(script, cwd=checkout, capture_output=True, text=True)
    assert found.returncode == 2 and "expected: source launch/setup_venv.sh" in found.stderr
    assert not list((checkout / ".venv").glob("installed*"))
