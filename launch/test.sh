#!/usr/bin/env bash
# Sets up .venv and runs the tests on the CPU. Arguments go to pytest: bash launch/test.sh -k packing
# With EXTRAS=test,parity the model is also compared with PyTorch itself, not only with what it gave
# (tests/goldens). On Linux, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu spares you the
# gigabytes of its CUDA build.
set -euo pipefail
export EXTRAS="${EXTRAS:-test}"
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
export JAX_PLATFORMS=cpu
# Two and more at a time, a file each; not more than four, since each holds up to 5 GB.
python -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
