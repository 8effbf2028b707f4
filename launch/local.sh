#!/usr/bin/env bash
# The whole job on this machine's CPU, on the embedded problems: problems → the scripted teacher's
# rationales → a tiny student trained with both losses, its checkpoints followed by the evaluator →
# export → three held-out problems answered. About three minutes on two cores after the install.
#
#   bash launch/local.sh [output directory, default runs/facts]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
export JAX_PLATFORMS=cpu
out="${1:-runs/facts}"
run="$out/step_by_step"

say() { printf '\n== %s\n' "$*"; }

say "1/5 problems and the teacher's rationales"
dslt extract --dataset facts --teacher scripted --output_dir "$out/records"

say "2/5 train, with the evaluator following in a process of its own"
binding="pipeline.DataConfig.records = ('$out/records/records.jsonl',)"
dslt evaluate --run_dir "$run" --follow >"$out/evaluate.log" 2>&1 &
evaluator=$!
trap 'kill "$evaluator" 2>/dev/null || true' EXIT
dslt train runs/step_by_step.gin settings/facts.gin --run_dir "$run" --gin "$binding"

say "3/5 the checkpoints, as the evaluator judged them"
wait "$evaluator" || { cat "$out/evaluate.log"; exit 1; }
trap - EXIT
cat "$out/evaluate.log"

say "4/5 export to a Hugging Face directory"
student="$out/student"
if [[ -e "$student" ]]; then echo "$student is there already and stays"; else
  dslt export --student "$run" --output_dir "$student"; fi

say "5/5 three held-out problems: the student beside the truth"
dslt predict --student "$student" --rationales --split test --limit 3 --format text \
  "$out/records/records.jsonl"

say "done"
printf '%-12s %s\n' records "$out/records/records.jsonl" run "$run" metrics "$run/metrics.jsonl" \
  evaluations "$run/evaluations.jsonl" student "$student"
