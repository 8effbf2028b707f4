#!/usr/bin/env bash
# The paper's comparison on the embedded problems, from nothing: records → 120 runs → one page with
# its figures. Two families, four methods, five data fractions, three seeds; under an hour on two
# CPU cores. Killed at any moment, the same command goes on.
#
#   bash launch/experiments.sh [output directory, default runs/embedded [flags of dslt sweep]]
#
# A quick look, one seed: bash launch/experiments.sh runs/look --gin "sweep.SweepConfig.seeds = (0,)"
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/embedded_records.sh"
out="${1:-runs/embedded}"
families=("$out/facts" "$out/sums")

for family in "${families[@]}"; do explain "$family" "${family##*/}"; done
dslt sweep sweeps/embedded.gin --output_dir "$out/runs" --jobs "$(nproc)" \
  --gin "sweep.SweepConfig.records = $(records_of "${families[@]}")" "${@:2}"
shopt -s nullglob  # the flags may leave all of these out
# What the students of all the data explain, for the report's table of rationales.
for best in "$out"/runs/*-step_by_step*-100pct-seed*/best/*; do
  run="${best%/best/*}" step="${best##*/}"
  if ! grep -q '"rationale": "' "$run/evaluations/$step/predictions.jsonl"; then
    dslt evaluate --run_dir "$run" --step "$step" \
      --gin "evaluate.EvalConfig.with_rationales = True"
  fi
done
dslt report "$out/runs" --output_dir "$out/report"
