#!/usr/bin/env bash
# Sets up .venv and runs the tests on the CPU. Arguments go to pytest: bash launch/test.sh -k packing
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
export JAX_PLATFORMS=cpu
python -m pytest "$@"
