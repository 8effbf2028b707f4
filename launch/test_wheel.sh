#!/usr/bin/env bash
# Builds a wheel, installs it into an empty environment of each Python given, and takes the embedded
# problems through the whole job in a directory where no checkout is. A few minutes and 3 GB each.
#
#   bash launch/test_wheel.sh python3.11 python3.12 python3.13
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
export JAX_PLATFORMS=cpu
unset PYTHONPATH

try() { # PYTHON
  local bin="$scratch/venv/bin" python
  python="$(command -v "$1")" # before the directory changes
  rm -rf "${scratch:?}"/*
  mkdir "$scratch/source" "$scratch/elsewhere"
  # A copy: a build in the checkout would leave its files there, and take in those of earlier ones.
  cp -R "$root"/{dslt,gin,setup.py,pyproject.toml,README.md,LICENSE} "$scratch/source"
  "$python" -m venv "$scratch/venv"
  "$bin/pip" --quiet wheel --no-deps --wheel-dir "$scratch" "$scratch/source"
  "$bin/pip" --quiet install "$scratch"/dslt-*.whl
  "$bin/pip" check
  cd "$scratch/elsewhere"
  "$bin/dslt" extract --dataset facts --teacher scripted --train 60 --validation 4 --test 4 \
    --output_dir records
  "$bin/dslt" train runs/step_by_step.gin settings/facts.gin --run_dir run \
    --gin "pipeline.DataConfig.records = ('records/records.jsonl',)" \
    --gin "train.TrainConfig.num_steps = 2"
  "$bin/dslt" evaluate --run_dir run
  "$bin/dslt" export --student run --output_dir student
  "$bin/dslt" predict --student student --rationales --split test --limit 1 --format text \
    records/records.jsonl
  "$bin/dslt" sweep sweeps/embedded.gin --output_dir sweep --list \
    --gin "sweep.SweepConfig.records = ('records/records.jsonl',)"
  # What the report and the server show travels too, whether or not their extras are installed.
  ls "$bin"/../lib/python*/site-packages/dslt/{serve_page.html,report/templates/page.html}
  cd "$root"
}

for python in "${@:-python3}"; do
  echo "== $("$python" --version)"
  try "$python" >"$scratch.log" 2>&1 || {
    tail -n 40 "$scratch.log" >&2
    echo "test_wheel.sh: the wheel does not work under $("$python" --version); see the lines above, and" \
      "all of them in $scratch.log" >&2
    exit 1
  }
  tail -n 4 "$scratch.log" | cut -c 1-100
done
rm -f "$scratch.log"
