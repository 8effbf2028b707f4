#!/usr/bin/env bash
# What of the method does it, on the embedded problems, at three seeds: target layouts, shuffled
# rationales, the term for consistency, one encoder pass; λ; other rationales, several of them,
# several teachers. 84 runs and one page. Killed at any moment, the same command goes on.
#
#   bash launch/ablations.sh [output directory, default runs/embedded [flags of dslt sweep]]
set -euo pipefail
export EXTRAS="${EXTRAS:-report}"
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
export JAX_PLATFORMS=cpu
out="${1:-runs/embedded}"
shift || true
mkdir -p "$out"

cat >"$out/two_teachers.json" <<'TEACHERS'
[{"name": "careful", "mistake_rate": 0.1},
 {"name": "careless", "mistake_rate": 0.4, "wording": 1, "weight": 0.25}]
TEACHERS
quoted() { printf "'%s', " "$@"; }
plain=() varied=()
for family in facts sums; do
  explain() {
    dslt extract --dataset "$family" --teacher scripted --mistake_rate 0.1 --facts 2 \
      --output_dir "$out/$1" "${@:2}"
    varied+=("$out/$1/records.jsonl")
  }
  plain+=("$out/$family/records.jsonl")
  explain "$family"
  explain "${family}_right" --keep gold
  explain "${family}_reworded" --wording 1
  explain "${family}_two_rationales" --samples 2 --max_rationales 2
  explain "${family}_two_teachers" --teachers "$out/two_teachers.json"
done
for sweep in ablations lambda rationales; do
  if [[ $sweep == rationales ]]; then records=("${varied[@]}"); else records=("${plain[@]}"); fi
  dslt sweep "sweeps/$sweep.gin" --output_dir "$out/ablations" --jobs "$(nproc)" \
    --gin "sweep.SweepConfig.records = ($(quoted "${records[@]}"))" "$@"
done
dslt report "$out/ablations" --output_dir "$out/ablations_report"
