#!/usr/bin/env bash
# Trains on Cloud TPU VMs, through queued resources; one slice or several.
#
#   launch/tpu_vm.sh ACTION --name=NAME --zone=ZONE [flags] [-- COMMAND…]
#
#   create    asks for the slices, and waits until they are there
#   install   copies this tree to all workers, and installs it
#   run       runs COMMAND on all workers, in the tree; after a preemption makes
#             the slices again and goes on
#   status    prints the state of the queued resource
#   collect   copies --from of the first worker to --to here
#   delete    gives the slices back: they are billed until then
#   all       create, install, run, collect if --from is given; and delete,
#             whatever happens
#
#   --name=NAME            of the queued resource
#   --zone=ZONE            such as us-east5-b
#   --project=PROJECT      (default: gcloud's)
#   --accelerator=TYPE     such as v6e-16; create, install, run, all need it
#   --version=VERSION      of the VM's software (default: the accelerator's)
#   --num_slices=N         more than one is multislice (default 1)
#   --spot                 cheaper, and may be preempted
#   --setup=COMMAND        runs on all workers after install, such as a mount
#   --env=FILE             environment of COMMAND (default launch/env/tpu.env)
#   --max_restarts=R       at most R restarts after preemptions (default 100)
#   --poll=SECONDS         between two looks at the state (default 30)
#   --from=PATH            on the worker, such as vlp_jax/runs
#   --to=DIR               here (default runs/NAME)
#   --dry_run              print the commands, run nothing
#
# gcloud must be logged in, and `ssh-add ~/.ssh/google_compute_engine` done: it
# connects to all workers at once. COMMAND's --workdir must be on a file system
# that all workers mount, so that it outlives them: docs/launch.md.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$here/common.sh"

flags=(
  [name]="" [zone]="" [project]="" [accelerator]="" [version]=""
  [num_slices]=1 [spot]=no [setup]="" [env]="$here/env/tpu.env"
  [max_restarts]=100 [poll]=30 [from]="" [to]="" [dry_run]=no
)
parse "$@"
((${#words[@]} == 1)) || fail "say one action: $0 create … (--help shows all)"
action="${words[0]}"
need name zone
need_whole num_slices max_restarts poll
where=("--zone=${flags[zone]}")
[[ -z "${flags[project]}" ]] || where+=("--project=${flags[project]}")
# What ssh ends with when the machine is gone.
readonly SSH_LOST=255
# gcloud starts a command on so many workers at once, and on the others when
# these have ended; --batch-size cannot raise it.
readonly at_once=64
tpus=(gcloud compute tpus queued-resources)
# How many workers the slices have at least.
workers="${flags[num_slices]}"
# State of the queued resource, and whether it was ever seen: see `look`.
now="" seen=no
# Whether the slices are to be there, with the tree installed: yes, no or never.
made=yes
# Whether a worker has ever said anything.
reached=no

# Prints the software that an accelerator needs.
# https://cloud.google.com/tpu/docs/runtimes
version_of() {
  case "$1" in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    *) fail "no software is known for \"$1\"; say --version=…" ;;
  esac
}

# Prints how many workers a slice has; nothing if that is not known.
# https://cloud.google.com/tpu/docs/supported-tpu-configurations
workers_of() {
  local number="${1##*-}"
  [[ "$number" =~ ^[1-9][0-9]*$ ]] || return 0
  case "$1" in
    # The number is that of cores, and a worker has eight.
    v[234]-* | v5p-*) echo $(((number + 7) / 8)) ;;
    # The number is that of chips; a worker has four if it is one of several.
    v5litepod-* | v6e-*) echo $((number > 8 ? (number + 3) / 4 : 1)) ;;
  esac
}

# Sets `now` to the state of the queued resource; to "" if there is none.
#
# Only "not found" says that there is none: the network, the service and the
# login fail at times, and are asked again. What is not allowed stays so, and
# what has never worked is asked five times.
look() {
  local errors reason tries=0
  now=""
  [[ "${flags[dry_run]}" == no ]] || return 0
  errors="$(mktemp)"
  until now="$("${tpus[@]}" describe "${flags[name]}" "${where[@]}" \
    '--format=value(state.state)' 2>"$errors")"; do
    now=""
    reason="$(grep -m 1 ERROR "$errors" || head -n 1 "$errors")"
    # gcloud writes a status of the service in several ways.
    case "${reason,,}" in
      *permission* | *invalid[_\ ]argument* | *"command not found"* | \
        *"invalid choice"* | *"error parsing [queued_resource]"* | \
        *"property ["*"] is not currently set"* | \
        *"do not currently have an active account"*)
        # Some say in further lines what is lacking.
        reason="$(sed -n '/ERROR/,$p' "$errors")"
        rm -f "$errors"
        fail "cannot see the state of ${flags[name]}: $reason"
        ;;
      *not[_\ ]found* | *"httperror 404"*) break ;;
    esac
    if [[ "$seen$reached" == nono ]] && ((++tries == 5)); then
      rm -f "$errors"
      tell "cannot see the state of ${flags[name]}, giving up: $reason"
      exit 1
    fi
    tell "cannot see the state of ${flags[name]}; trying again: $reason"
    sleep "${flags[poll]}" || true
    [[ "$stopped" == no ]] || break
  done
  seen=yes
  rm -f "$errors"
}

request() {
  local what=(
    "--accelerator-type=${flags[accelerator]}"
    "--runtime-version=${flags[version]}"
  )
  if ((flags[num_slices] > 1)); then
    what+=("--node-count=${flags[num_slices]}" "--node-prefix=${flags[name]}")
  else
    what+=("--node-id=${flags[name]}")
  fi
  [[ "${flags[spot]}" == no ]] || what+=(--spot)
  run "${tpus[@]}" create "${flags[name]}" "${where[@]}" "${what[@]}"
}

# Waits until the slices are there; 75 if they were taken away at once.
await() {
  local before=""
  [[ "${flags[dry_run]}" == no ]] || return 0
  while true; do
    look
    [[ "$stopped" == no ]] || return "$PREEMPTED"
    [[ "$now" == "$before" ]] || tell "${flags[name]} is ${now:-gone}"
    before="$now"
    case "$now" in
      ACTIVE) return ;;
      SUSPENDING | SUSPENDED) return "$PREEMPTED" ;;
      # What waits is gone only if somebody has deleted it.
      "" | FAILED)
        tell "no slices; gcloud compute tpus queued-resources describe says why"
        exit 1
        ;;
    esac
    sleep "${flags[poll]}" || true
  done
}

# Makes the slices, unless they are there; clears away what was preempted.
create() {
  look
  while [[ "$now" == SUSPENDING || "$now" == DELETING ]]; do
    sleep "${flags[poll]}" || true
    [[ "$stopped" == no ]] || return "$PREEMPTED"
    look
  done
  [[ "$stopped" == no ]] || return "$PREEMPTED"
  case "$now" in
    "") request || return "$SSH_LOST" ;;
    FAILED | SUSPENDED)
      delete || return "$SSH_LOST"
      request || return "$SSH_LOST"
      ;;
  esac
  await
}

delete() {
  run "${tpus[@]}" delete "${flags[name]}" "${where[@]}" --force --quiet
}

on_workers() {
  run "${tpus[@]}" ssh "${flags[name]}" "${where[@]}" --node=all --worker=all \
    "--command=$1"
}

# Runs a command on all workers, each of which ends with a line launch-status=N.
#
# Returns the worst of these: see `weigh`. If that is neither 2 nor 75, and some
# workers have said nothing, it returns 255, or 2 if gcloud does not know its
# flags. gcloud leaves out slices that are gone with a warning, and ends with 0.
ask_workers() {
  local statuses=(0 0) worst=0 file answer answers
  if [[ "${flags[dry_run]}" == yes ]]; then
    on_workers "$1"
    return
  fi
  file="$(mktemp)"
  on_workers "$1" | awk -v file="$file" '
    /^launch-status=[0-9]+$/ { print substr($0, 15) > file }
    /^launch(-status=|: connected)/ { reached = 1 }
    { print; fflush() }
    END { exit !reached }' || statuses=("${PIPESTATUS[@]}")
  ((statuses[1])) || reached=yes
  mapfile -t answers <"$file"
  rm -f "$file"
  for answer in "${answers[@]}"; do
    weigh "$answer"
  done
  if ((worst == MISTAKE || worst == PREEMPTED)); then
    return "$worst"
  elif ((${#answers[@]} < workers || (worst == 0 && statuses[0]))); then
    [[ "$stopped" == yes ]] ||
      tell "${#answers[@]} of $workers workers have said how they ended;" \
        "gcloud ended with ${statuses[0]}"
    worst="$SSH_LOST"
    ((statuses[0] != MISTAKE)) || worst="$MISTAKE"
  fi
  return "$worst"
}

# Copies what is needed of this tree, and installs it. Returns as `ask_workers`;
# workers say only 0 or 1, since 2 of tar or uv is no mistake of the user's.
install() {
  local archive=/tmp/vlp_jax.tar.gz command status=0
  [[ "${flags[dry_run]}" == yes ]] || archive="$(mktemp --suffix=.tar.gz)"
  run tar -czf "$archive" -C "$(dirname "$here")" --exclude=__pycache__ \
    vlp_jax configs launch setup.py pyproject.toml README.md &&
    run "${tpus[@]}" scp "$archive" "${flags[name]}:vlp_jax.tar.gz" \
      "${where[@]}" --node=all --worker=all || status=$?
  run rm -f "$archive"
  ((status == 0)) || return "$SSH_LOST"
  command="trap 's=\$((\$? != 0)); echo; echo launch-status=\$s; exit \$s' EXIT"
  command+="; mkdir -p vlp_jax && tar -xzf vlp_jax.tar.gz -C vlp_jax"
  command+=" && bash vlp_jax/launch/worker.sh install"
  [[ -z "${flags[setup]}" ]] || command+=" && eval $(quote "${flags[setup]}")"
  ask_workers "$command"
}

# Makes the slices and installs; 75 if that is to be tried again.
make() {
  local status=0
  { create && install; } || status=$?
  if [[ "$stopped" == yes ]]; then
    return "$PREEMPTED"
  elif ((status == 1)) && [[ "$made" == no ]]; then
    tell "the installation failed"
  elif ((status != SSH_LOST)); then
    return "$status"
  fi
  sleep "${flags[poll]}" || true
  look
  # As long as no worker was ever reached, this is a mistake, not a loss: a
  # quota, or a key. A slice that was taken away is neither.
  if [[ "$stopped$reached" == nono && ("$now" == ACTIVE || -z "$now") ]]; then
    tell "cannot make the slices and install; see what gcloud says"
    return 1
  fi
  return "$PREEMPTED"
}

# Runs the command on all workers, as a launch of its own: see worker.sh.
run_on_workers() {
  local id
  id="$(date +%s)-$RANDOM"
  ask_workers "$(quote env "${settings[@]}" bash vlp_jax/launch/worker.sh run \
    "$id" "${command[@]}")"
}

# Runs the command once; 75 or 69 if it is to be started again.
run_once() {
  local status=0
  if [[ "$made" != yes ]]; then
    make || return
    made=yes
  fi
  run_on_workers || status=$?
  if ((status == 0 || status == MISTAKE)); then
    return "$status"
  elif [[ "$stopped" == yes ]]; then
    return "$PREEMPTED"
  fi
  if is_loss "$status" || ((status == SSH_LOST)); then
    # The state follows some time after the machines.
    tell "a worker or its connection is lost ($status); looking again"
    sleep "${flags[poll]}" || true
    status="$LOST"
  fi
  look
  if [[ "$stopped" == yes ]]; then
    return "$status"
  elif [[ "$now" != ACTIVE ]]; then
    tell "${flags[name]} is ${now:-gone}; making it again"
    made=no status="$PREEMPTED"
  elif [[ "$reached" == no ]]; then
    tell "cannot reach any worker of ${flags[name]}; see what gcloud says"
    return 1
  fi
  return "$status"
}

run_command() {
  local status=0
  trap 'stopped=yes' INT TERM
  with_restarts run_once || status=$?
  if [[ "$stopped" == yes && "$made" == yes ]] && ((status)); then
    tell "stopping the workers"
    on_workers "bash vlp_jax/launch/worker.sh stop" || true
  fi
  return "$status"
}

# Copies into a folder of its own first: what was there before says nothing.
collect() (
  to="${flags[to]:-runs/${flags[name]}}" status=0
  need from
  fresh="$to/.collect"
  run mkdir -p "$to" || exit 1
  if [[ "${flags[dry_run]}" == no ]]; then
    fresh="$(mktemp -d "$fresh.XXXX")" || exit 1
  fi
  trap 'run rm -rf "$fresh"' EXIT
  run "${tpus[@]}" scp --recurse "${flags[name]}:${flags[from]}" "$fresh" \
    "${where[@]}" --node=0 --worker=0 || status=$?
  # gcloud leaves out a slice that is gone, and ends with 0.
  if [[ "${flags[dry_run]}" == no && -z "$(ls -A "$fresh")" ]]; then
    tell "nothing was copied: ${flags[from]} is not there, or the first slice"
    status=1
  fi
  if ! run cp -rf "$fresh/." "$to"; then
    tell "what was copied is in $fresh"
    trap - EXIT
    status=1
  fi
  return "$status"
)

all() {
  local status=0
  trap 'delete || tell "NOT DELETED, and billed until it is: ${flags[name]}"' EXIT
  made=never
  run_command || status=$?
  [[ -z "${flags[from]}" ]] || collect || status="${status/#0/1}"
  return "$status"
}

case "$action" in
  create | install | run | all)
    # A restart makes the slices again.
    need accelerator
    [[ -n "${flags[version]}" ]] ||
      flags[version]="$(version_of "${flags[accelerator]}")"
    each="$(workers_of "${flags[accelerator]}")"
    workers=$((flags[num_slices] * ${each:-1}))
    ((workers <= at_once)) ||
      fail "$workers workers: gcloud starts a command on $at_once at once; use" \
        "launch/gke_xpk.sh"
    ;;
esac
case "$action" in
  run | all)
    need_command
    read_env "${flags[env]}"
    ;;
esac
case "$action" in
  create | install | collect | delete | all) "$action" ;;
  run) run_command ;;
  status) run "${tpus[@]}" describe "${flags[name]}" "${where[@]}" \
    '--format=value(state.state)' ;;
  *) fail "no action \"$action\"; --help shows them" ;;
esac
