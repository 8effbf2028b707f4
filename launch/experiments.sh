#!/usr/bin/env bash
# The paper's comparison on the embedded problems, from nothing: records → 120 runs → one page with
# its figures. Two families, four methods, five data fractions, three seeds; under an hour on two
# CPU cores. Killed at any moment, the same command goes on.
#
#   bash launch/experiments.sh [output directory, default runs/embedded [flags of dslt sweep]]
#
# A quick look, one seed: bash launch/experiments.sh runs/look --gin "sweep.SweepConfig.seeds = (0,)"
set -euo pipefail
export EXTRAS="${EXTRAS:-report}"
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
export JAX_PLATFORMS=cpu
out="${1:-runs/embedded}"
shift || true

records=()
for family in facts sums; do
  dslt extract --dataset "$family" --teacher scripted --mistake_rate 0.1 --facts 2 \
    --output_dir "$out/$family"
  records+=("'$out/$family/records.jsonl'")
done
joined="$(IFS=,; echo "${records[*]}")"
dslt sweep sweeps/embedded.gin --output_dir "$out/runs" --jobs "$(nproc)" \
  --gin "sweep.SweepConfig.records = ($joined)" "$@"
dslt report "$out/runs" --output_dir "$out/report"
