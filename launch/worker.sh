#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on each worker, in the tree that it has copied.
#
#   launch/worker.sh install        installs vlp_jax into .venv of the tree
#   launch/worker.sh run COMMAND…   runs a command; one that still runs ends first
#   launch/worker.sh stop           has the command save itself and end
#
# `run` ends with a line `launch-status=N`: gcloud has one exit status for all
# workers, and which worker's it is cannot be known. What the command prints is
# also in .launch.log of the tree.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly pid_file=.launch.pid log=.launch.log
# Long enough for a checkpoint to be written.
readonly grace=300

# Ends a command that an earlier connection has left behind, and takes the lock
# that a `run` holds while its command lives: two would write one folder.
take_over() {
  local pid told="" i=0
  exec 9>>.launch.lock
  while true; do
    pid="$(cat "$pid_file" 2>/dev/null || true)"
    if [[ -z "$pid" ]] || ! kill -0 "$pid" 2>/dev/null; then
      ! flock --nonblock 9 || return 0
    elif [[ "$pid" != "$told" ]]; then
      kill -TERM "$pid" 2>/dev/null || true
      told="$pid" i=0
    elif ((++i == grace * 10)); then
      kill -KILL "$pid" 2>/dev/null || true
    fi
    sleep 0.1 || true # a signal for all ends it, too
  done
}

# Passes on what the command prints. The command itself writes to a file, since
# a connection that breaks would end it at its next word.
relay() {
  trap '' INT TERM HUP
  exec tail --pid="$1" --sleep-interval=0.1 --bytes="+$2" --follow "$log"
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
    take_over
    PATH="$PWD/.venv/bin:$PATH"
    touch "$log"
    start=$(($(stat --format=%s "$log") + 1)) status=0
    "${@:2}" >>"$log" 2>&1 9>&- &
    pid=$!
    # A shutdown of the machine reaches the command through this.
    trap 'kill -TERM "$pid" 2>/dev/null || true' TERM HUP
    echo "$pid" >"$pid_file"
    relay "$pid" "$start" 9>&- &
    relay=$!
    # Of a broken connection, this one must not die, either: it keeps the lock.
    trap '' PIPE
    while kill -0 "$pid" 2>/dev/null; do
      sleep 0.1 || true # a signal for all ends it, too
    done
    wait "$pid" || status=$?
    rm -f "$pid_file"
    # Another may start now, even if a connection that hangs keeps this one.
    exec 9>&-
    wait "$relay" || true
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
