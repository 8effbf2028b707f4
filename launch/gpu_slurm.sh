#!/usr/bin/env bash
# dslt on the GPUs of a Slurm cluster. From the checkout, which like --run_dir must lie on a file
# system that all nodes see; flags of sbatch override the ones below:
#
#   sbatch --nodes=2 launch/gpu_slurm.sh train runs/step_by_step.gin settings/paper.gin \
#     models/t5_v1_1_large.gin --run_dir runs/paper \
#     --gin "pipeline.DataConfig.records = ('runs/svamp/records/records.jsonl',)" \
#     --gin "pipeline.DataConfig.vocabulary = 'path/to/t5-v1_1-large'" \
#     --gin "train.TrainConfig.init_from = 'path/to/t5-v1_1-large'"
#
# A line of `dslt sweep … --list` is such a command too, for --gpus-per-node=1 --ntasks-per-node=1.
# train and evaluate run on every GPU, other commands in one process. At the time limit dslt finishes
# its step and saves, and the job queues again and resumes; cancelled (scancel), it saves and ends.
#
# One task a GPU, and each sees all GPUs of its node: JAX takes that of the task's number there.
#SBATCH --job-name=dslt
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=dslt-%j.log
set -euo pipefail
interrupted=130 # dslt's status when a signal has ended it, after it has saved

die() {
  echo "gpu_slurm.sh: $*" >&2
  exit 2
}

if [[ "${1:-}" == dslt ]]; then shift; fi
(($#)) || die "found no dslt command; expected one, such as: sbatch launch/gpu_slurm.sh train …"
[[ -n "${SLURM_JOB_ID:-}" ]] || die "found no Slurm job; submit it: sbatch launch/gpu_slurm.sh $*"
cd "$SLURM_SUBMIT_DIR" # Slurm runs a copy of this script from elsewhere
[[ -f launch/setup_venv.sh ]] || die "$PWD is no checkout of dslt; submit from the checkout's root"
EXTRAS="${EXTRAS-gpu}"
# Jobs that begin at once install once, where the file system has locks.
if { exec {lock}>>.venv.lock; } 2>/dev/null; then flock "$lock" || echo "gpu_slurm.sh: goes on" >&2; fi
source launch/setup_venv.sh
if [[ -n "${lock:-}" ]]; then exec {lock}>&-; fi

tasks=(--nodes=1 --ntasks=1)
if [[ "$1" == train || "$1" == evaluate ]]; then
  tasks=()
  set -- "$@" --distributed
fi
status=0
srun ${tasks[@]+"${tasks[@]}"} dslt "$@" || status=$?
state=""
if ((status == interrupted)); then
  # Where Slurm does not answer: who cancelled can cancel again, a job that is not queued is lost.
  state="$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" || state=RUNNING
fi
if [[ "$state" == RUNNING ]]; then # else it was cancelled
  echo "gpu_slurm.sh: saved before the time limit; queues again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
