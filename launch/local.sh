#!/usr/bin/env bash
# Runs N processes of one command on this machine, as on N machines.
#
#   launch/local.sh N [flags] -- python -m vlp_jax.main --config=…
#
#   --devices=D        CPU devices of each process (default 1)
#   --grace=SECONDS    once a process has failed, how long the others may take
#                      to end by themselves, and then after SIGTERM (default 60)
#   --max_restarts=R   start again after 75 and after a loss, at most R times
#                      (default 0)
#   --env=FILE         environment of the processes (default launch/env/cpu.env)
#   --dry_run          print the commands, run nothing
#
# Lines of process i begin with [i]. SIGTERM and SIGINT become SIGTERM for all
# processes, which then save; a second one becomes SIGKILL. Ends with 2 if a
# process did (something must be mended), else with 75 if one did (preempted and
# saved), else with the status of the first that failed by itself, else with that
# of a loss: 69 or 134 (it missed another), 137 or 143 (it was killed).
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$here/common.sh"

flags=(
  [devices]=1 [grace]=60 [max_restarts]=0 [env]="$here/env/cpu.env" [dry_run]=no
)
parse "$@"
[[ "${#words[@]}" == 1 && "${words[0]}" =~ ^[1-9][0-9]*$ ]] ||
  fail "say how many processes: $0 2 -- python …"
need_whole devices grace max_restarts
need_command
read_env "${flags[env]}"
count="${words[0]}"

free_port() {
  python3 -c 'import socket
with socket.socket() as s:
  s.bind(("localhost", 0))
  print(s.getsockname()[1])'
}

# Passes lines on until there are no more, whatever signals come.
label() {
  trap '' INT TERM
  exec sed -u "s/^/[$1] /"
}

start_all() {
  local i port=PORT
  pids=()
  [[ "${flags[dry_run]}" == yes ]] || port="$(free_port)"
  for ((i = 0; i < count; i++)); do
    local process=(
      env "${settings[@]}" "JAX_NUM_CPU_DEVICES=${flags[devices]}"
      "JAX_COORDINATOR_ADDRESS=localhost:$port" "JAX_NUM_PROCESSES=$count"
      "JAX_PROCESS_ID=$i" "${command[@]}"
    )
    if [[ "${flags[dry_run]}" == yes ]]; then
      quote "${process[@]}"
      continue
    fi
    "${process[@]}" > >(label "$i") 2> >(label "$i" >&2) &
    pids[i]=$!
    tell "process $i has pid ${pids[i]}"
  done
}

signal_all() {
  local pid
  for pid in "${pids[@]}"; do
    kill -s "$1" "$pid" 2>/dev/null || true
  done
}

on_signal() {
  if [[ "$stopped" == yes ]]; then
    signal_all KILL
  else
    stopped=yes
    signal_all TERM
  fi
}

# Waits for all processes, and returns the worst status.
#
# What ends because it was told to by this script says nothing about the run.
wait_all() {
  local i status deadline=0 told=no
  worst=0
  while ((${#pids[@]})); do
    for i in "${!pids[@]}"; do
      if kill -0 "${pids[i]}" 2>/dev/null; then
        continue
      fi
      status=0
      wait "${pids[i]}" || status=$?
      unset "pids[i]"
      [[ "$told" == no ]] || continue
      weigh "$status"
      if ((status && !deadline)); then
        tell "process $i ended with status $status"
        deadline=$((SECONDS + flags[grace]))
      fi
    done
    if ((deadline && SECONDS >= deadline && ${#pids[@]})); then
      if [[ "$told" == no ]]; then
        tell "stopping the others"
        signal_all TERM
        told=yes deadline=$((SECONDS + flags[grace] + 1))
      else
        signal_all KILL
      fi
    fi
    sleep 0.1 || true # a signal for all ends it, too
  done
  return "$worst"
}

run_once() {
  start_all
  # A signal that came meanwhile found only some processes, or none.
  [[ "$stopped" == no ]] || signal_all TERM
  wait_all
}

trap on_signal INT TERM
with_restarts run_once
