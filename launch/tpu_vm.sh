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
tpus=(gcloud compute tpus queued-resources)

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

# Prints the state of the queued resource; nothing if there is none.
state() {
  [[ "${flags[dry_run]}" == no ]] || return 0
  "${tpus[@]}" describe "${flags[name]}" "${where[@]}" \
    '--format=value(state.state)' 2>/dev/null || true
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

# Waits until the slices are there.
await() {
  local now="" before=""
  [[ "${flags[dry_run]}" == no ]] || return 0
  while true; do
    now="$(state)"
    [[ "$now" == "$before" ]] || tell "${flags[name]} is ${now:-gone}"
    before="$now"
    case "$now" in
      ACTIVE) return ;;
      "" | FAILED | SUSPENDED)
        tell "no slices; gcloud compute tpus queued-resources describe says why"
        return 1
        ;;
    esac
    sleep "${flags[poll]}" || true
    [[ "$stopped" == no ]] || return 1
  done
}

# Makes the slices, unless they are there; clears away what was preempted.
create() {
  while [[ "$(state)" == SUSPENDING || "$(state)" == DELETING ]]; do
    sleep "${flags[poll]}"
  done
  case "$(state)" in
    "") request || return ;;
    FAILED | SUSPENDED)
      delete || return
      request || return
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

# Copies what is needed of this tree, and installs it.
install() {
  local archive=/tmp/vlp_jax.tar.gz command status=0
  [[ "${flags[dry_run]}" == yes ]] || archive="$(mktemp --suffix=.tar.gz)"
  run tar -czf "$archive" -C "$(dirname "$here")" --exclude=__pycache__ \
    vlp_jax configs launch setup.py pyproject.toml README.md &&
    run "${tpus[@]}" scp "$archive" "${flags[name]}:vlp_jax.tar.gz" \
      "${where[@]}" --node=all --worker=all || status=$?
  run rm -f "$archive"
  ((status == 0)) || return "$status"
  command="mkdir -p vlp_jax && tar -xzf vlp_jax.tar.gz -C vlp_jax"
  command+=" && bash vlp_jax/launch/worker.sh install"
  [[ -z "${flags[setup]}" ]] || command+=" && ${flags[setup]}"
  on_workers "$command"
}

# Runs the command on all workers, and returns the worst of their statuses: 2,
# then 75, then another.
run_on_workers() {
  local words status=0 statuses
  words="$(quote env "${settings[@]}" bash vlp_jax/launch/worker.sh run \
    "${command[@]}")"
  if [[ "${flags[dry_run]}" == yes ]]; then
    on_workers "$words"
    return
  fi
  statuses="$(mktemp)"
  on_workers "$words" | awk -v statuses="$statuses" '
    /^launch-status=/ { print > statuses }
    { print; fflush() }' || status="${PIPESTATUS[0]}"
  if grep -qx "launch-status=$MISTAKE" "$statuses"; then
    status="$MISTAKE"
  elif grep -qx "launch-status=$PREEMPTED" "$statuses"; then
    status="$PREEMPTED"
  fi
  rm -f "$statuses"
  return "$status"
}

# Runs the command once, and makes the slices again if they are gone; 75 if it is to be started again.
run_once() {
  local status=0 now
  run_on_workers || status=$?
  if [[ "$stopped" == yes ]]; then
    tell "stopping the workers"
    on_workers "bash vlp_jax/launch/worker.sh stop" || true
    return "$PREEMPTED"
  elif ((status == 0 || status == MISTAKE)); then
    return "$status"
  fi
  now="$(state)"
  if [[ "$now" != ACTIVE ]]; then
    tell "${flags[name]} is ${now:-gone}; making it again"
    create && install || return 1
  elif ((status == SSH_LOST)); then
    tell "the connection is lost; trying again"
    sleep "${flags[poll]}"
  elif ((status != PREEMPTED)); then
    return "$status"
  fi
  return "$PREEMPTED"
}

run_command() {
  trap 'stopped=yes' INT TERM
  with_restarts run_once
}

collect() {
  local to="${flags[to]:-runs/${flags[name]}}"
  need from
  run mkdir -p "$to"
  run "${tpus[@]}" scp --recurse "${flags[name]}:${flags[from]}" "$to" \
    "${where[@]}" --node=0 --worker=0
}

all() {
  local status=0
  trap 'delete || tell "NOT DELETED, and billed until it is: ${flags[name]}"' EXIT
  create
  install
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
