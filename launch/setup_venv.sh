# shellcheck shell=bash
# Sourced by the other scripts: leaves an activated .venv with the project in it, in the
# repository's root. PYTHON chooses the interpreter of a new one; EXTRAS, such as "test" or
# "test,parity", what is installed beside the project. Installs again when setup.py has changed.
if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
  echo "found a script of its own; expected: source launch/setup_venv.sh" >&2
  exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.." || return
if [[ ! -x .venv/bin/pip ]]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "found $("${PYTHON:-python3}" --version 2>&1); dslt needs Python 3.11 or later: set PYTHON to one" >&2
    return 2
  }
  "${PYTHON:-python3}" -m venv .venv || return
fi
# shellcheck disable=SC1091
source .venv/bin/activate || return
stamp=".venv/installed-${EXTRAS:-alone}"
if ! cmp -s setup.py "$stamp"; then
  echo "installing dslt${EXTRAS:+ with $EXTRAS} into .venv (a minute or two)"
  python -m pip install --quiet --editable ".${EXTRAS:+[$EXTRAS]}" || return
  cp setup.py "$stamp"
fi
