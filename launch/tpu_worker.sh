#!/usr/bin/env bash
# What launch/tpu.sh has a worker do. It is copied there as ~/tpu_worker.sh, and can be called by
# hand on a worker. All it makes lies in ~/dslt: code/ (the checkout with its .venv) and job/ (the
# command, its log, how it ended).
#
#   bash tpu_worker.sh install SOURCE COMMIT [BUCKET | SERVER:/SHARE]
#   bash tpu_worker.sh start train runs/step_by_step.gin … --distributed
#   bash tpu_worker.sh poll 0 | state | tail 20 | stop
#
# Status: 0, or 2 with a message to standard error.
set -euo pipefail
home="${DSLT_HOME:-$HOME/dslt}"
code="$home/code"
job="$home/job"
shared="${DSLT_SHARED:-/mnt/dslt}"
heartbeats="${DSLT_HEARTBEATS:-/run/dslt}" # made at boot by tpu_idle.sh, which reads it
mkdir -p "$home"

die() {
  echo "$(hostname): $*" >&2
  exit 2
}

heartbeat() { if [[ -d "$heartbeats" ]]; then touch "$heartbeats/$UID"; fi; }

# Prints `none`, `running`, `ended STATUS WHEN` or `lost`: gone without having said its status.
state() {
  if [[ -f "$job/pid" && ! -f "$job/ended" ]] && kill -0 "$(<"$job/pid")" 2>/dev/null; then
    echo running
  elif [[ -f "$job/ended" ]]; then
    echo "ended $(<"$job/ended")"
  elif [[ -d "$job" ]]; then
    echo lost
  else
    echo none
  fi
}

check_free() {
  if [[ "$(state)" == running ]]; then
    die "runs 'dslt $(<"$job/command")' already; expected a free worker, because a chip serves one" \
      "process. Wait for it (launch/tpu.sh logs), or stop it (launch/tpu.sh stop)"
  fi
}

# The code at a commit, its environment and the shared directory. What is there already stays; what
# an interrupted call left behind is done again.
install() {
  local source="$1" commit="$2"
  if [[ -f "$source" ]]; then source="$(realpath "$source")"; fi # a bundle
  exec 9>"$home/install.lock"
  flock -n 9 || die "another installation is under way; wait for it, or end it, and try again"
  check_free
  heartbeat
  if [[ -n "${3:-}" ]]; then mount_shared "$3"; fi
  git init --quiet "$code"
  rm -f "$code/.git/index.lock" # of a checkout that was killed; we hold the lock
  git -C "$code" fetch --quiet --force "$source" HEAD '+refs/heads/*:refs/remotes/source/*'
  git -C "$code" checkout --quiet --force --detach "$commit" ||
    die "commit $commit is not in $source; push it, or leave out --repo to copy it from your checkout"
  cd "$code"
  make_venv
  if ! works; then # a pip that was killed can leave an environment that only looks whole
    echo "$(hostname): .venv does not import dslt; making it anew" >&2
    rm -rf .venv
    make_venv
    works || die "the installation does not import dslt, even after a second try; see the lines above"
  fi
  heartbeat
  echo "$(hostname): installed $(git describe --always)"
}

# In a process of its own: setup_venv.sh changes the environment and the directory.
make_venv() {
  local python
  python="$(find_python)"
  PYTHON="$python" EXTRAS="${DSLT_EXTRAS-tpu}" bash -euo pipefail -c 'source launch/setup_venv.sh' ||
    die "the installation failed; see the lines above"
}

works() { [[ -x .venv/bin/python ]] && .venv/bin/python -c 'import dslt.config'; }

# A Python that dslt runs on. The TPU images have 3.10; uv brings a newer one without root.
find_python() {
  local python
  for python in python3 python3.13 python3.12 python3.11; do
    if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$python"
      return
    fi
  done
  python3 -m pip install --quiet --user uv >&2
  python3 -m uv python install --quiet 3.12 >&2
  python3 -m uv python find 3.12
}

# The directory that all workers share: a bucket through Cloud Storage FUSE, or a Filestore share.
mount_shared() {
  if mountpoint --quiet "$shared"; then return; fi
  sudo mkdir -p "$shared"
  if [[ "$1" == *:/* ]]; then
    command -v mount.nfs >/dev/null || sudo apt-get install --quiet --yes nfs-common >&2
    sudo mount "$1" "$shared"
    sudo chmod 1777 "$shared"
  else
    command -v gcsfuse >/dev/null || install_gcsfuse
    sudo chown "$USER" "$shared"
    gcsfuse --implicit-dirs "$1" "$shared" >&2
  fi
  mountpoint --quiet "$shared" || die "$1 could not be mounted at $shared; see the lines above"
}

# Source: Google Cloud's page "Install Cloud Storage FUSE".
install_gcsfuse() {
  local packages="https://packages.cloud.google.com/apt" key=/usr/share/keyrings/cloud.google.asc
  curl --silent --show-error --fail "$packages/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -c -s) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update --quiet >&2
  sudo apt-get install --quiet --yes gcsfuse >&2
}

# Runs `dslt ARGS` detached from this connection.
start() {
  check_free
  [[ -x "$code/.venv/bin/python" ]] || die "is not installed; run launch/tpu.sh run, which installs"
  rm -rf "$job.previous"
  if [[ -d "$job" ]]; then mv "$job" "$job.previous"; fi
  mkdir "$job"
  echo "$*" >"$job/command"
  # In its own session: it must outlive this connection. 9 is the lock that it must not inherit.
  setsid bash "${BASH_SOURCE[0]}" attend "$@" </dev/null >"$job/log" 2>&1 9>&- &
  while [[ ! -f "$job/pid" ]]; do sleep 0.05; done
}

# Runs `dslt ARGS`, and says how it ended. SIGTERM, from `stop` or as the system shuts down, is
# handed on: dslt then finishes its step and saves.
attend() {
  cd "$code"
  # shellcheck disable=SC1091
  source .venv/bin/activate
  PYTHONUNBUFFERED=1 python -m dslt.main "$@" &
  local child=$! status is_interrupted
  trap 'is_interrupted=1; kill -TERM "$child" 2>/dev/null || true' TERM
  while kill -0 $$ 2>/dev/null && heartbeat; do sleep "${DSLT_HEARTBEAT_SECS:-30}"; done & # not longer than this lives
  local beats=$!
  echo $$ >"$job/pid.partial"
  mv "$job/pid.partial" "$job/pid"
  while true; do # a signal cuts `wait` short
    is_interrupted=0
    status=0
    wait "$child" || status=$?
    ((is_interrupted)) || break
  done
  kill "$beats" 2>/dev/null || true
  echo "$status $(date +%s%N)" >"$job/ended.partial"
  mv "$job/ended.partial" "$job/ended"
}

# The state and the log's size on the first line, then the log from byte OFFSET to there. The state
# is read first: what had ended by then has written all it will.
poll() {
  local state size
  state="$(state)"
  size="$(wc -c <"$job/log" 2>/dev/null || echo 0)"
  echo "$size $state"
  if ((size > $1)); then tail -c "+$(($1 + 1))" "$job/log" | head -c $((size - $1)); fi
}

# Finish the step, save, and end.
stop() { if [[ "$(state)" == running ]]; then kill -TERM "$(<"$job/pid")"; fi; }

case "${1:-}" in
  install | start | attend | poll | state | stop) "$@" ;;
  tail) if [[ -f "$job/log" ]]; then tail -n "$2" "$job/log"; fi ;;
  ready) ;; # this worker answers
  *) die "found '${1:-}'; expected install, start, poll, state, tail or stop" ;;
esac
