#!/usr/bin/env bash
# One of the paper's released datasets through the whole job on a CPU, with a small T5 from scratch.
#
#   bash launch/released.sh svamp DIRECTORY [OUTPUT [STEPS]]
#
# DIRECTORY holds the released layout: svamp_train.json, svamp_test.json, llm/train_CoT_0.json, …
set -euo pipefail
if [[ $# -lt 2 ]]; then
  echo "usage: bash launch/released.sh svamp|cqa|esnli|anli1 DIRECTORY [OUTPUT [STEPS]]" >&2
  exit 2
fi
dataset="$1"
data="$(cd "$2" && pwd)"
out="${3:-runs/$dataset}"
steps="${4:-300}"
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
export JAX_PLATFORMS=cpu

dslt extract --dataset "$dataset" --teacher released --data_dir "$data" --output_dir "$out/records"
dslt train runs/step_by_step.gin settings/scratch.gin --run_dir "$out/step_by_step" \
  --gin "pipeline.DataConfig.records = ('$out/records/records.jsonl',)" \
  --gin "train.TrainConfig.num_steps = $steps"
dslt evaluate --run_dir "$out/step_by_step"
if [[ ! -e "$out/student" ]]; then
  dslt export --student "$out/step_by_step" --output_dir "$out/student"
fi
dslt predict --student "$out/student" --rationales --split test --limit 3 --format text \
  "$out/records/records.jsonl"
