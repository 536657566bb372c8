#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on each worker, in the tree that it has copied.
#
#   launch/worker.sh install           installs vlp_jax into .venv of the tree
#   launch/worker.sh run ID COMMAND…   runs the command of the launch ID; that of
#                                      another launch ends first
#   launch/worker.sh stop              has the command save itself and end
#
# Where a connection breaks, gcloud connects again and runs the same once more. A
# `run` whose launch has begun here only passes on what its command prints.
#
# `run` ends with a line `launch-status=N`: gcloud has one exit status for all
# workers, and which worker's it is cannot be known. What the command prints is
# also in .launch.log of the tree.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly id="${2:-none}"
# How the command of this launch has ended; the pid and the launch of the one
# that runs; what all have printed.
readonly ended=".launch.ended.$id" pid_file=.launch.pid log=.launch.log
# Long enough for a checkpoint to be written.
readonly grace=300
# As in launch/common.sh.
readonly LOST=69

# Takes the lock that is held while a command runs: two would write one folder.
# Ends a command that another launch has left behind. Sets `again` instead, and
# `pid` if it still runs, if this launch has begun before.
take_over() {
  local run told="" i=0
  again=no
  exec 9>>.launch.lock
  while true; do
    pid="" run=""
    read -r pid run 2>/dev/null <"$pid_file" || true
    if [[ -e "$ended" ]]; then
      again=yes pid=""
      return
    elif [[ "$run" == "$id" ]]; then
      again=yes
      return
    elif [[ -z "$pid" ]] || ! kill -0 "$pid" 2>/dev/null; then
      if flock --nonblock 9; then
        # Whoever has just held it may have been of this launch.
        [[ ! -e "$ended" ]] || again=yes
        pid=""
        return
      fi
    elif [[ "$pid" != "$told" ]]; then
      kill -TERM "$pid" 2>/dev/null || true
      told="$pid" i=0
    elif ((++i == grace * 10)); then
      kill -KILL "$pid" 2>/dev/null || true
    fi
    sleep 0.1 || true # a signal for all ends it, too
  done
}

# Runs the command, and writes how it ends. Lives on when the connection breaks,
# and keeps the lock.
keep() {
  local status=0
  "$@" 9>&- &
  pid=$!
  # A shutdown of the machine reaches the command through this.
  trap 'kill -TERM "$pid" 2>/dev/null || true' TERM HUP
  echo "$pid $id" >"$pid_file"
  while kill -0 "$pid" 2>/dev/null; do
    sleep 0.1 || true # a signal for all ends it, too
  done
  wait "$pid" || status=$?
  # 255 is what ssh says of a broken connection.
  ((status != 255)) || status=1
  echo "$status" >.launch.ended
  mv .launch.ended "$ended"
  rm -f "$pid_file"
}

case "${1:-}" in
  install)
    # Images of TPU VMs have Python 3.10; uv brings a newer one.
    PATH="$HOME/.local/bin:$PATH"
    command -v uv >/dev/null || python3 -m pip install --quiet --user uv
    uv venv --quiet --allow-existing --python 3.12 .venv
    uv pip install --quiet --python .venv/bin/python -e '.[tpu]'
    ;;
  run)
    # tpu_vm.sh sees by this that the worker can be reached.
    echo "launch: connected to $HOSTNAME"
    take_over
    touch "$log"
    start=$(($(stat --format=%s "$log") + 1))
    if [[ "$again" == no ]]; then
      PATH="$PWD/.venv/bin:$PATH"
      keep "${@:3}" >>"$log" 2>&1 &
      pid=$!
    fi
    # The lock is opened anew: it is to be free when the other has ended.
    exec 9>>.launch.lock
    trap '' INT TERM HUP PIPE
    # The command itself writes to a file, since a connection that breaks would
    # end it at its next word.
    [[ -z "$pid" ]] ||
      tail --pid="$pid" --sleep-interval=0.1 --bytes="+$start" --follow "$log" ||
      true
    until [[ -e "$ended" ]] || flock --nonblock 9; do
      sleep 0.1
    done
    # Nobody knows how it ended if who waited for it was killed.
    status="$LOST"
    [[ ! -e "$ended" ]] || status="$(cat "$ended")"
    # On a line of its own, whatever other workers have printed half.
    printf '\nlaunch-status=%s\n' "$status" || true
    exit "$status"
    ;;
  stop) take_over ;;
  *)
    echo "error: launch/tpu_vm.sh calls this; see the comment at its top" >&2
    exit 2
    ;;
esac
