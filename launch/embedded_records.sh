# shellcheck shell=bash
# Sourced by the experiments: the environment, and how their records are made.
export EXTRAS="${EXTRAS:-report}"
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
export JAX_PLATFORMS=cpu

# explain DIRECTORY FAMILY [flags of dslt extract]: the problems of a family into DIRECTORY.
explain() {
  dslt extract --dataset "$2" --teacher scripted --mistake_rate 0.1 --facts 2 \
    --output_dir "$1" "${@:3}"
}

# records_of DIRECTORY...: their records as the value of SweepConfig.records.
records_of() {
  printf '('
  printf "'%s/records.jsonl', " "$@"
  printf ')'
}
