# Sourced by the other scripts: leaves an activated .venv with the project and its test extra.
# PYTHON chooses the interpreter of a new one. Installed anew when setup.py has changed.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ ! -x .venv/bin/python ]]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "found $("${PYTHON:-python3}" --version 2>&1); dslt needs Python 3.11 or later: set PYTHON to one" >&2
    exit 2
  }
  "${PYTHON:-python3}" -m venv .venv
fi
# shellcheck disable=SC1091
source .venv/bin/activate
stamp=.venv/installed-from
if ! cmp -s setup.py "$stamp"; then
  echo "installing dslt into .venv (about two minutes the first time)"
  # The CPU build of PyTorch: the default one brings gigabytes of CUDA. It is for tests alone.
  python -m pip install --quiet --upgrade pip
  python -m pip install --quiet torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu ||
    echo "no PyTorch: parity tests will use the stored goldens" >&2
  python -m pip install --quiet --editable '.[test]'
  cp setup.py "$stamp"
fi
