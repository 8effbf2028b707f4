#!/usr/bin/env bash
# Deletes a TPU that nobody uses. launch/tpu.sh create gives it to the TPU as its startup script, so
# it watches from the first boot on, whatever becomes of the machine that made it. It runs as root on
# every worker, and on worker 0 to the end.
#
# In use is a TPU while a job or an installation touches /run/dslt/*, or a terminal shows or reads
# anything. The TPU's service account needs the right to delete it (roles/tpu.admin).
set -uo pipefail
heartbeats="${DSLT_HEARTBEATS:-/run/dslt}"
terminals="${DSLT_TERMINALS:-/dev/pts}"
attributes=http://metadata.google.internal/computeMetadata/v1/instance/attributes
export PATH="$PATH:/snap/bin"
shopt -s nullglob

attribute() { curl --silent --fail --header 'Metadata-Flavor: Google' "$attributes/$1"; }

mkdir -p "$heartbeats"
chmod 1777 "$heartbeats"
if [[ "$(attribute agent-worker-number)" != 0 ]]; then exit 0; fi
name="$(attribute dslt-name)" && zone="$(attribute dslt-zone)" && project="$(attribute dslt-project)" &&
  minutes="$(attribute dslt-idle-minutes)" || exit 1
touch "$heartbeats/boot"
while sleep "${DSLT_IDLE_POLL_SECS:-60}"; do
  in_use="$(find "$heartbeats" "$terminals"/[0-9]* -not -type d -mmin "-$minutes" -print -quit)"
  if [[ -n "$in_use" ]]; then continue; fi
  echo "dslt: $name was idle for $minutes minutes; deleting it"
  where=("$name" "--zone=$zone" "--project=$project" --quiet)
  if attribute dslt-queued >/dev/null; then
    gcloud compute tpus queued-resources delete "${where[@]}" --force --async && break
  else
    gcloud compute tpus tpu-vm delete "${where[@]}" --async && break
  fi
done
