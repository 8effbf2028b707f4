#!/usr/bin/env bash
# What of the method does it, on the embedded problems, at three seeds: target layouts, shuffled
# rationales, the term for consistency, one encoder pass; λ; other rationales, several of them,
# several teachers. 84 runs and one page. Killed at any moment, the same command goes on.
#
#   bash launch/ablations.sh [output directory, default runs/embedded [flags of dslt sweep]]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/embedded_records.sh"
out="${1:-runs/embedded}"
mkdir -p "$out"

cat >"$out/two_teachers.json" <<'TEACHERS'
[{"name": "careful", "mistake_rate": 0.1},
 {"name": "careless", "mistake_rate": 0.4, "wording": 1, "weight": 0.25}]
TEACHERS
plain=() varied=()
for family in facts sums; do
  explain "$out/$family" "$family"
  explain "$out/${family}_right" "$family" --keep gold
  explain "$out/${family}_reworded" "$family" --wording 1
  explain "$out/${family}_two_rationales" "$family" --samples 2 --max_rationales 2
  explain "$out/${family}_two_teachers" "$family" --teachers "$out/two_teachers.json"
  plain+=("$out/$family")
  varied+=("$out/$family"{,_right,_reworded,_two_rationales,_two_teachers})
done
for sweep in ablations lambda rationales; do
  if [[ $sweep == rationales ]]; then records=("${varied[@]}"); else records=("${plain[@]}"); fi
  dslt sweep "sweeps/$sweep.gin" --output_dir "$out/ablations" --jobs "$(nproc)" \
    --gin "sweep.SweepConfig.records = $(records_of "${records[@]}")" "${@:2}"
done
dslt report "$out/ablations" --output_dir "$out/ablations_report"
