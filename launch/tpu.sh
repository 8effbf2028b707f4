#!/usr/bin/env bash
# dslt on a Cloud TPU slice, with bash and gcloud alone.
#
#   export DSLT_TPU_NAME=paper DSLT_TPU_ZONE=us-west4-a DSLT_TPU_PROJECT=my-project
#   bash launch/tpu.sh create --slice slices/t5_v1_1_xl_v5e_4x4.gin --spot
#   bash launch/tpu.sh run --spot --bucket my-bucket --recreate 5 -- train runs/step_by_step.gin \
#     settings/paper.gin slices/t5_v1_1_xl_v5e_4x4.gin --run_dir /mnt/dslt/paper \
#     --gin "pipeline.DataConfig.records = ('/mnt/dslt/records/records.jsonl',)" \
#     --gin "pipeline.DataConfig.vocabulary = '/mnt/dslt/t5-v1_1-xl'" \
#     --gin "train.TrainConfig.init_from = '/mnt/dslt/t5-v1_1-xl'"
#   bash launch/tpu.sh delete
#
# create  makes the slice, and refuses to make it twice
# run     copies the code at a commit to every worker, installs it there (what is installed already
#         is not again), runs the dslt command on all of them and follows worker 0's log. Ctrl-C ends
#         the following, not the job. train and evaluate run on every worker, with --distributed where
#         there are several; other commands on worker 0, sweep on slices of one worker alone.
# status  the slice's state and each worker's
# logs    follows the log of --worker; with `--worker all`, prints the last lines of each
# ssh     a shell on --worker, or the command after --
# stop    dslt finishes its step, saves and ends; the slice stays, and is paid for
# delete  deletes the slice
#
# What a run writes must lie below /mnt/dslt, a directory that all workers share and that outlives
# the slice: a bucket (--bucket) or a Filestore share (--filestore). What it reads lies there too: the
# records, and the download that vocabulary and weights are in.
#
# Flags, and the environment that they default to:
#   --name, --zone, --project     DSLT_TPU_NAME, DSLT_TPU_ZONE, DSLT_TPU_PROJECT; no other default
#   --slice FILE, --type TYPE     DSLT_TPU_TYPE: a gin file of gin/slices, or such as v5litepod-16; in
#                                 `run` the slice file of the dslt command says it
#   --version VERSION             DSLT_TPU_VERSION: of the TPU's software; by default its type's
#   --spot                        may be preempted, and costs less
#   --queued                      a queued resource: waits in line for the slice
#   --wait_minutes N              60: for the slice, and then for its workers, to be ready
#   --idle_minutes N              60: the slice deletes itself when nobody used it for so long
#   --bucket NAME                 DSLT_TPU_BUCKET: mounted on every worker as /mnt/dslt
#   --filestore SERVER:/SHARE     DSLT_TPU_FILESTORE: likewise
#   --commit COMMIT, --repo URL   HEAD, of this checkout unless a URL to clone is given
#   --recreate N                  0: how often a preempted slice is made again, and the run resumed
#   --fetch DIR                   copies the command's --run_dir or --output_dir here at the end
#   --delete                      deletes the slice when the run has ended well
#   --worker N                    0
#   --create_flag F, --ssh_flag F added to gcloud's create, and to its ssh and scp; may be repeated
#   --dry_run                     prints every command, and runs none
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$here")"
shared="${DSLT_SHARED:-/mnt/dslt}"
poll_secs="${DSLT_TPU_POLL_SECS:-15}"
parallel=32 # connections at once
lost=75     # the status of an attempt whose slice is gone; sysexits calls it a temporary failure

name="${DSLT_TPU_NAME:-}"
zone="${DSLT_TPU_ZONE:-}"
project="${DSLT_TPU_PROJECT:-}"
type="${DSLT_TPU_TYPE:-}"
version="${DSLT_TPU_VERSION:-}"
bucket="${DSLT_TPU_BUCKET:-}"
filestore="${DSLT_TPU_FILESTORE:-}"
slice="" spot="" queued="" delete_after="" dry_run="" repo="" fetch="" commit=HEAD
wait_minutes=60 idle_minutes=60 recreate=0 worker=0
create_flags=()
ssh_flags=("--ssh-flag=-o ServerAliveInterval=20")
scp_flags=()
command=() # dslt's

say() { printf '== %s\n' "$*" >&2; }

die() {
  printf 'tpu.sh: %s\n' "$*" >&2
  exit 2
}

# --- arguments

parse() {
  action="${1:-}"
  case "$action" in
    create | run | status | logs | ssh | stop | delete) shift ;;
    -h | --help | help) usage && exit 0 ;;
    *) die "found '$action'; expected create, run, status, logs, ssh, stop or delete (--help)" ;;
  esac
  while (($#)); do
    local flag="${1%%=*}"
    case "$1" in
      --) shift && command=("$@") && break ;;
      --spot) spot=1 && shift && continue ;;
      --queued) queued=1 && shift && continue ;;
      --delete) delete_after=1 && shift && continue ;;
      --dry_run) dry_run=1 && shift && continue ;;
      --*=*) set -- "$flag" "${1#*=}" "${@:2}" ;;
    esac
    case "$flag" in
      --name | --zone | --project | --slice | --type | --version | --bucket | --filestore | --commit | \
        --repo | --recreate | --fetch | --worker | --wait_minutes | --idle_minutes | \
        --create_flag | --ssh_flag) (($# > 1)) || die "$flag needs a value" ;;
      *) die "found '$1'; expected a flag of --help, and dslt's own arguments after --" ;;
    esac
    case "$flag" in
      --create_flag) create_flags+=("$2") ;;
      --ssh_flag) ssh_flags+=("$2") && scp_flags+=("$2") ;;
      *) printf -v "${flag#--}" %s "$2" ;;
    esac
    shift 2
  done
}

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }

check_arguments() {
  local flag
  for flag in name zone project; do
    [[ -n "${!flag}" ]] || die "--$flag is missing; give it, or set DSLT_TPU_$(upper "$flag")." \
      "There is no default, not even gcloud's: a slice in the wrong place costs money unseen"
  done
  for flag in wait_minutes idle_minutes recreate; do
    [[ "${!flag}" =~ ^[0-9]+$ ]] || die "--$flag is '${!flag}'; expected a whole number"
  done
  ((idle_minutes > 0)) || die "--idle_minutes is 0; expected at least 1"
  [[ "$worker" =~ ^([0-9]+|all)$ ]] || die "--worker is '$worker'; expected a number, or all"
  bucket="${bucket#gs://}"
  bucket="${bucket%/}"
  [[ "$bucket" != */* ]] || die "--bucket is '$bucket'; expected a bucket's name alone"
  [[ -z "$filestore" || "$filestore" == *:/* ]] ||
    die "--filestore is '$filestore'; expected SERVER:/SHARE, such as 10.0.0.2:/share"
  [[ -z "$bucket" || -z "$filestore" ]] || die "found --bucket and --filestore; expected one of them"
}

upper() { printf %s "$1" | tr '[:lower:]' '[:upper:]'; }

# The type that the slice file names, which is --slice or among the dslt command's files.
read_slice() {
  local word found
  for word in ${command[@]+"${command[@]}"}; do
    if [[ -z "$slice" && "$word" == *slices/*.gin ]]; then slice="$word"; fi
  done
  if [[ -z "$slice" ]]; then return; fi
  local file="$slice"
  [[ -f "$file" ]] || file="$root/gin/$slice"
  [[ -f "$file" ]] || die "$slice: is no file here and none in gin/; there are:" \
    "$(cd "$root/gin" && echo slices/*.gin)"
  # Its first line: `# T5 v1.1 xl on v5e:4x4 (v5litepod-16), …`
  found="$(sed -n '1s/.*(\(v[0-9a-z]*-[0-9]*\)).*/\1/p' "$file")"
  [[ -n "$found" ]] || die "$file: its first line names no slice; expected such as (v5litepod-16)," \
    "or give --type"
  [[ -z "$type" || "$type" == "$found" ]] ||
    die "--type is $type, but $file was planned for $found; expected the same. Leave one of them out"
  type="$found"
}

# Source: Google Cloud's page "TPU software versions".
choose_version() {
  if [[ -n "$version" ]]; then return; fi
  case "$type" in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    v4-*) version=tpu-ubuntu2204-base ;;
    *) die "--type is '$type'; expected v4-N, v5litepod-N, v5p-N or v6e-N (or give --version too)" ;;
  esac
}

# --- gcloud

# Every command that asks, makes or changes anything elsewhere goes through here.
execute() { if [[ -n "$dry_run" ]]; then quote "$@"; else "$@"; fi; }

# Words as a shell reads them back. Single quotes, and not printf's %q, for people to read.
quote() {
  local word flag words=() plain='^[A-Za-z0-9_./:=@%+,-]+$' inner="'\\''"
  for word in "$@"; do
    flag="" # of --flag='a value'
    if [[ "$word" =~ ^--[a-z-]+= ]]; then flag="${BASH_REMATCH[0]}" && word="${word#"$flag"}"; fi
    if [[ ! "$word" =~ $plain ]]; then word="'${word//\'/$inner}'"; fi
    words+=("$flag$word")
  done
  echo "${words[*]}"
}

tpus() { execute gcloud compute tpus "$1" "$2" "$name" "--zone=$zone" "--project=$project" "${@:3}"; }
tpu_vm() { tpus tpu-vm "$@"; }
queued_resource() { tpus queued-resources "$@"; }

# Sets vm_state (such as READY), vm_type, num_workers and queue_state; empty where there is none.
# Fails, with the state UNKNOWN, where gcloud cannot say.
look() {
  local vm_format='value[separator="|"](state,acceleratorType.basename(),networkEndpoints.len())'
  local queue_format='value(state.state)' found
  vm_state=UNKNOWN vm_type="" num_workers=all queue_state=""
  if [[ -n "$dry_run" ]]; then
    tpu_vm describe "--format=$vm_format"
    queued_resource describe "--format=$queue_format"
    return
  fi
  found="$(describe tpu_vm "$vm_format")" || return
  queue_state="$(describe queued_resource "$queue_format")" || return
  vm_state="" num_workers=0
  IFS="|" read -r vm_state vm_type num_workers <<<"$found" || true
}

# What gcloud says of it, or nothing where it does not exist.
describe() {
  local found
  if found="$("$1" describe "--format=$2" 2>"$scratch/describe.err")"; then
    echo "$found"
  elif ! grep -q NOT_FOUND "$scratch/describe.err"; then
    cat "$scratch/describe.err" >&2
    return 1
  fi
}

look_or_die() {
  look || die "gcloud cannot say whether $name is there in $zone of $project; it said why above"
}

is_gone() { [[ "$vm_state" =~ ^(|PREEMPTED|TERMINATED|DELETING)$ ]]; }

in_words() { echo "${vm_state:-not there}${queue_state:+, $queue_state in the queue}"; }

check_ready() {
  [[ "$vm_state" == READY || -n "$dry_run" ]] || die "the slice $name in $zone is $(in_words); expected" \
    "READY. Make it: bash launch/tpu.sh create; if it was preempted: delete it first"
}

# One command of tpu_worker.sh on one worker: its number, what goes before, and its arguments.
on_worker() {
  local there
  there="${2}bash tpu_worker.sh$(printf ' %q' "${@:3}")"
  tpu_vm ssh "--worker=$1" "${ssh_flags[@]}" "--command=$there"
}

# Calls a function with each worker's number, 0 … COUNT - 1, all at once, and ARGS. What each says
# goes to $scratch/N.out and N.err. Sets failed: the workers where it did not work.
each_worker() {
  local count="$1" i pids=()
  shift
  failed=()
  if [[ -n "$dry_run" ]]; then
    "$1" all "${@:2}" # in truth a connection for each, so that each one's words and status are known
    return
  fi
  rm -f "$scratch"/[0-9]*.out
  for ((i = 0; i < count; i++)); do
    while (($(jobs -rp | wc -l) >= parallel)); do sleep 0.2; done
    "$1" "$i" "${@:2}" >"$scratch/$i.out" 2>"$scratch/$i.err" </dev/null &
    pids+=($!)
  done
  for ((i = 0; i < count; i++)); do wait "${pids[i]}" || failed+=("$i"); done
}

# Where a worker has failed, shows what the first of them said, and dies.
check_failed() {
  if ((${#failed[@]} == 0)); then return; fi
  local first="${failed[0]}" others=""
  if ((${#failed[@]} > 1)); then others=" (and on ${failed[*]:1})"; fi
  tail -n 20 -q "$scratch/$first.out" "$scratch/$first.err" | sed "s/^/worker $first: /" >&2
  die "$1 on worker $first of $num_workers$others; expected it to work on all. $2"
}

# --- create, delete

create() {
  [[ -n "$type" ]] || die "found no accelerator type; give --slice slices/…, or --type such as" \
    "v5litepod-16"
  choose_version
  look_or_die
  [[ -z "$vm_state$queue_state" || -n "$dry_run" ]] ||
    die "found $name in $zone: $(in_words); expected none, so that nothing is paid for twice. Use it:" \
      "bash launch/tpu.sh run; delete it: bash launch/tpu.sh delete; or choose another --name"
  make_slice
}

make_slice() {
  local metadata="dslt-name=$name,dslt-zone=$zone,dslt-project=$project,dslt-idle-minutes=$idle_minutes"
  local flags=("--accelerator-type=$type")
  if [[ -n "$spot" ]]; then flags+=(--spot); fi
  flags+=(${create_flags[@]+"${create_flags[@]}"} "--metadata-from-file=startup-script=$here/tpu_idle.sh")
  say "create $name, a $type in $zone of $project; it deletes itself after $idle_minutes idle minutes"
  if [[ -n "$queued" ]]; then
    queued_resource create "--node-id=$name" "--runtime-version=$version" "${flags[@]}" \
      "--metadata=$metadata,dslt-queued=1" || die "gcloud did not take the request; it said why above"
  else
    tpu_vm create "--version=$version" "${flags[@]}" "--metadata=$metadata" ||
      die "gcloud made no slice; it said why above. Where capacity is lacking: --queued, or another" \
        "--zone; nothing is paid for a slice that is not there, see bash launch/tpu.sh status"
  fi
  wait_for_slice
}

wait_for_slice() {
  if [[ -n "$dry_run" ]]; then return; fi
  local deadline=$((SECONDS + wait_minutes * 60))
  while look || true && [[ "$vm_state" != READY ]]; do
    [[ ! "$queue_state" =~ ^(FAILED|SUSPENDED)$ ]] ||
      die "the request for $name is $queue_state; expected ACTIVE. See why: gcloud compute tpus" \
        "queued-resources describe $name --zone=$zone --project=$project; then delete and create again"
    ((SECONDS < deadline)) ||
      die "$name is $(in_words) after $wait_minutes minutes; expected READY. It" \
        "stays requested: see bash launch/tpu.sh status, or give it up with delete"
    sleep "$poll_secs"
  done
  say "$name is READY: $num_workers workers"
}

delete_slice() {
  look_or_die
  if [[ -n "$dry_run" && -n "$queued" || -n "$queue_state" ]]; then
    queued_resource delete --force --quiet
  elif [[ -n "$dry_run" || -n "$vm_state" ]]; then
    tpu_vm delete --quiet
  else
    say "$name is not there in $zone of $project: nothing to delete"
  fi
}

# --- run

check_command() {
  ((${#command[@]})) || die "found no dslt command; expected it after --, such as" \
    "-- train runs/step_by_step.gin settings/paper.gin --run_dir $shared/paper"
  if [[ "${command[0]}" == dslt ]]; then command=("${command[@]:1}"); fi
  output="" # the directory that the command writes
  local i
  for ((i = 0; i < ${#command[@]}; i++)); do
    case "${command[i]}" in
      --run_dir | --output_dir) output="${command[i + 1]:-}" ;;
      --run_dir=* | --output_dir=*) output="${command[i]#*=}" ;;
      --follow) die "found --follow; expected evaluate without it: a chip serves one process, so" \
        "judge the checkpoints when training has ended, or on another machine that sees them" ;;
    esac
    [[ "${command[i]}" != *gs://* ]] || die "found '${command[i]}'; dslt reads and writes plain paths." \
      "Give --bucket, and name what lies in it as $shared/…"
  done
  [[ -z "$output" || "$output" == "$shared"/* ]] || die "the command writes to $output; expected a" \
    "directory below $shared, which all workers share and which outlives the slice"
  [[ -z "$output" || -n "$bucket$filestore" ]] ||
    die "the command writes to $output; give the --bucket or the --filestore that $shared shall be"
  [[ -z "$fetch" || -n "$output" ]] || die "--fetch: the command has no --run_dir or --output_dir"
  if [[ "$type" =~ -([0-9]+)$ ]] && ((BASH_REMATCH[1] > 8)); then check_one_worker "$type"; fi
  if ((recreate == 0)); then return; fi
  [[ -n "$type" ]] || die "--recreate needs to know what to make: give --slice or --type, and --spot" \
    "or --queued as in create"
  choose_version
}

# A sweep trains in one process; on worker 0's CPU, where other commands go, it would take for ever.
check_one_worker() {
  if [[ "${command[0]}" != sweep ||
    " ${command[*]} " == *" --list "* || " ${command[*]} " == *" --estimate "* ]]; then return; fi
  die "$1 has several workers, and a sweep trains in one process; expected a slice of one worker, such" \
    "as v5litepod-8. On several, give train and evaluate of each run"
}

# A bucket without folders renames a directory object by object, and a checkpoint is a directory that
# gets its name when it is whole: an interruption would leave half a checkpoint that looks whole.
check_bucket() {
  if [[ -z "$bucket" ]]; then return; fi
  local ask=(gcloud storage buckets describe "gs://$bucket" --raw)
  if [[ -n "$dry_run" ]]; then
    execute "${ask[@]}" '--format=value(hierarchicalNamespace.enabled)'
    return
  fi
  local found
  found="$("${ask[@]}" '--format=value(hierarchicalNamespace.enabled)')" ||
    die "gs://$bucket cannot be read; gcloud said why above"
  [[ "$found" == True ]] || die "gs://$bucket has no hierarchical namespace; expected one, because a" \
    "checkpoint is renamed when it is whole. Make a bucket: gcloud storage buckets create gs://NAME" \
    "--location=${zone%-*} --project=$project --uniform-bucket-level-access" \
    "--enable-hierarchical-namespace"
}

# The files that workers get, and where they find the commit: in a bundle of this checkout's history,
# or at a URL.
pack() {
  files=("$here/tpu_worker.sh")
  found_at="$repo"
  if [[ -n "$repo" ]]; then
    [[ "$commit" != HEAD ]] || die "--repo needs --commit, the name of the commit to run"
    return
  fi
  local changed
  changed="$(git -C "$root" status --porcelain | wc -l)"
  [[ "$commit" != HEAD || "$changed" -eq 0 ]] || die "found $((changed)) uncommitted changes in" \
    "$root; expected none, because a run is of a commit. Commit them, or run without them:" \
    "--commit $(git -C "$root" rev-parse --short HEAD)"
  git -C "$root" merge-base --is-ancestor "$commit" HEAD 2>/dev/null ||
    die "commit $commit is not in the history of $root; check it out first, or give --repo"
  commit="$(git -C "$root" rev-parse "$commit^{commit}")"
  execute git -C "$root" bundle create --quiet "$scratch/dslt.bundle" HEAD
  files+=("$scratch/dslt.bundle")
  found_at=dslt.bundle
}

copy_to() {
  execute gcloud compute tpus tpu-vm scp "${files[@]}" "$name:" "--worker=$1" "--zone=$zone" \
    "--project=$project" ${scp_flags[@]+"${scp_flags[@]}"}
}

install_on_workers() {
  say "copy the code to $num_workers workers"
  local deadline=$((SECONDS + wait_minutes * 60)) count
  # Worker 0 first: gcloud adds the ssh key at the first connection, and several at once would get
  # into each other's way. A slice that has just been made answers a while after it is READY.
  for count in 1 "$num_workers"; do
    while each_worker "$count" copy_to && ((${#failed[@]})); do
      check_there || return
      ((SECONDS < deadline)) || check_failed "the code could not be copied in $wait_minutes minutes" \
        "See it: bash launch/tpu.sh ssh --worker ${failed[0]}. A worker that never comes up needs a \
new slice: bash launch/tpu.sh delete, then create"
      sleep "$poll_secs"
    done
    if [[ -n "$dry_run" ]]; then break; fi
  done
  say "install commit ${commit:0:12} on $num_workers workers"
  each_worker "$num_workers" on_worker "" install "$found_at" "$commit" "$bucket$filestore"
  if ((${#failed[@]})); then check_there || return; fi
  check_failed "the installation failed" "The same command goes on where it stopped"
}

# Whether the slice is there, or may be; $lost where it is gone.
check_there() {
  look || return 0
  if is_gone; then return "$lost"; fi
}

start_on_workers() {
  local arguments=("${command[@]}") environment="" reason
  num_runners=1
  if [[ "${command[0]}" =~ ^(train|evaluate)$ ]]; then
    num_runners="$num_workers"
    if [[ "$num_workers" != 1 ]]; then arguments+=(--distributed); fi
  elif [[ "$num_workers" != 1 ]]; then
    environment="JAX_PLATFORMS=cpu " # one worker's chips do not start without the others'
  fi
  say "on $num_runners workers: dslt ${arguments[*]}"
  each_worker "$num_runners" on_worker "$environment" start "${arguments[@]}"
  if ((${#failed[@]} == 0)); then return; fi
  check_there || return
  reason="$(tail -n 3 "$scratch/${failed[0]}.err")"
  local first="${failed[0]}"
  each_worker "$num_runners" on_worker "" stop
  die "dslt could not be started on worker $first, and was stopped on the others: $reason"
}

# Prints a worker's log as it grows, until the job has ended there. Returns $lost where the slice is
# gone. A dropped connection is made again.
follow() {
  local offset=0 polls=0 size state deadline=0
  if [[ -n "$dry_run" ]]; then
    on_worker "$1" "" poll 0
    return
  fi
  while true; do
    if on_worker "$1" "" poll "$offset" >"$scratch/poll" 2>"$scratch/poll.err" </dev/null &&
      read -r size state <"$scratch/poll"; then
      sed 1d "$scratch/poll"
      offset="$size" deadline=0
      if [[ "$state" != running ]]; then return; fi
      polls=$((polls + 1))
      # Where another worker dies, dslt ends this one too; should it hang instead, it is seen here.
      if ((polls % 20 == 0)) && [[ "$action" == run ]] && ! all_are_well; then return; fi
    else
      check_there || return
      if ((deadline == 0)); then deadline=$((SECONDS + wait_minutes * 60)); fi
      ((SECONDS < deadline)) || die "worker $1 of $name did not answer for $wait_minutes minutes:" \
        "$(tail -n 3 "$scratch/poll.err"). The job may go on: bash launch/tpu.sh status, or logs"
    fi
    sleep "$poll_secs"
  done
}

all_are_well() {
  each_worker "$num_runners" on_worker "" state
  ! grep -qsE '^(ended [1-9]|lost)' "$scratch"/[0-9]*.out
}

# Asks every worker how it ended, shows the last lines of the one that failed first, and returns its
# status.
judge() {
  if [[ -n "$dry_run" ]]; then
    each_worker all on_worker "" state
    return
  fi
  local deadline=$((SECONDS + 60)) i state status when first="" first_status=0 first_when=0
  while true; do
    each_worker "$num_runners" on_worker "" state
    if ((${#failed[@]})); then check_there || return; fi
    if ((SECONDS >= deadline)); then break; fi
    if ((${#failed[@]} == 0)) && ! grep -qs '^running' "$scratch"/[0-9]*.out; then break; fi
    sleep "$poll_secs"
  done
  for ((i = 0; i < num_runners; i++)); do
    read -r state status when <"$scratch/$i.out" || state="does not answer"
    case "$state" in
      ended) state="ended with status $status" ;;
      running) status=1 when="$(date +%s)999999999" state="still runs, a minute after worker 0" ;;
      lost) status=1 when=0 state="was killed, or rebooted" ;; # what others say follows from it
      *) status=1 when=0 ;;
    esac
    if ((status == 0)); then continue; fi
    if [[ -z "$first" ]] || ((when < first_when)); then
      first="$i" first_status="$status" first_when="$when"
      echo "worker $i $state" >"$scratch/verdict"
    fi
  done
  if [[ -n "$first" ]]; then
    say "$(<"$scratch/verdict"), before any other of the $num_runners failed; its last lines:"
    on_worker "$first" "" tail 20 >&2 || true
  fi
  if ((first_status == lost)); then first_status=1; fi # dslt has a 75 of its own
  return "$first_status"
}

attempt() { install_on_workers && start_on_workers && follow 0 && judge; }

run() {
  check_command
  pack
  check_bucket
  look_or_die
  if [[ -z "$dry_run" && "$queue_state" =~ ^(CREATING|ACCEPTED|PROVISIONING|WAITING) ]]; then
    wait_for_slice
  fi
  if ! is_gone || ((recreate == 0)); then check_ready; fi
  if ! is_gone && [[ -n "$type" && -n "$vm_type" && "$type" != "$vm_type" ]]; then
    die "the slice $name is a $vm_type, but ${slice:---type} says $type; expected the same"
  fi
  if [[ "$num_workers" != [01] && "$num_workers" != all ]]; then check_one_worker "the slice $name"; fi
  local status
  while true; do
    status="$lost"
    if ! is_gone; then
      status=0
      attempt || status=$?
    fi
    if ((status != lost)); then break; fi
    ((recreate > 0)) || die "the slice was preempted; what was saved is in $output. Go on from there:" \
      "bash launch/tpu.sh delete, create, and the same run; or give run --recreate N"
    recreate=$((recreate - 1))
    say "the slice is gone; making it (then $recreate more times)"
    while look || true && [[ "$vm_state" == DELETING ]]; do sleep "$poll_secs"; done
    delete_slice
    make_slice
  done
  if ((status)); then
    say "dslt ended with status $status; the slice $name stays, for $idle_minutes idle minutes at most"
    return "$status"
  fi
  say "done${output:+: $output}"
  if [[ -n "$fetch" ]]; then fetch_output; fi
  if [[ -n "$delete_after" ]]; then delete_slice; else say "$name stays: bash launch/tpu.sh delete"; fi
}

fetch_output() {
  execute mkdir -p "$fetch"
  if [[ -n "$bucket" ]]; then
    execute gcloud storage cp "gs://$bucket/${output#"$shared"/}" "$fetch" --recursive
  else
    execute gcloud compute tpus tpu-vm scp "$name:$output" "$fetch" --recurse --worker=0 \
      "--zone=$zone" "--project=$project" ${scp_flags[@]+"${scp_flags[@]}"}
  fi
}

# --- status, logs, ssh, stop

status() {
  look_or_die
  if [[ -z "$dry_run" ]]; then
    echo "$name in $zone of $project: $(in_words) ${vm_type:+($vm_type)}"
    if [[ "$vm_state" != READY ]]; then return; fi
  fi
  each_worker "$num_workers" on_worker "" state
  show_each
}

logs() {
  look_or_die
  check_ready
  if [[ "$worker" == all ]]; then
    each_worker "$num_workers" on_worker "" tail 20
    show_each
  else
    follow "$worker" || die "the slice is gone: $(in_words)"
  fi
}

show_each() {
  local i
  if [[ -n "$dry_run" ]]; then return; fi
  for ((i = 0; i < num_workers; i++)); do
    cat "$scratch/$i.out" "$scratch/$i.err" | sed "s/^/worker $i: /"
  done
}

stop() {
  look_or_die
  check_ready
  each_worker "$num_workers" on_worker "" stop
  check_failed "stopping failed" "See what runs: bash launch/tpu.sh status"
  say "dslt finishes its step and saves; the slice stays, and is paid for: bash launch/tpu.sh delete"
}

open_ssh() {
  look_or_die
  check_ready
  if ((${#command[@]})); then
    tpu_vm ssh "--worker=$worker" "${ssh_flags[@]}" "--command=$(quote "${command[@]}")"
  else
    tpu_vm ssh "--worker=$worker" "${ssh_flags[@]}"
  fi
}

parse "$@"
check_arguments
read_slice
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
case "$action" in
  create | run | status | logs | stop) "$action" ;;
  ssh) open_ssh ;;
  delete) delete_slice ;;
esac
