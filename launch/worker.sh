#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on each worker, in the tree that it has copied.
#
#   launch/worker.sh install        installs vlp_jax into .venv of the tree
#   launch/worker.sh run COMMAND…   runs a command; one that still runs ends first
#   launch/worker.sh stop           has the command save itself and end
#
# `run` ends with a line `launch-status=N`: gcloud has one exit status for all
# workers, and which worker's it is cannot be known.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly pid_file=.launch.pid
# Long enough for a checkpoint to be written.
readonly grace=300

# Ends a command that an earlier connection has left behind.
stop() {
  local pid i
  [[ -r "$pid_file" ]] || return 0
  pid="$(<"$pid_file")"
  kill -TERM "$pid" 2>/dev/null || return 0
  for ((i = 0; i < grace * 10; i++)); do
    kill -0 "$pid" 2>/dev/null || return 0
    sleep 0.1 || true # a signal for all ends it, too
  done
  kill -KILL "$pid"
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
    stop
    PATH="$PWD/.venv/bin:$PATH"
    "${@:2}" &
    pid=$! status=0
    echo "$pid" >"$pid_file"
    # A shutdown of the machine reaches the command through this.
    trap 'kill -TERM "$pid" 2>/dev/null || true' TERM HUP
    while kill -0 "$pid" 2>/dev/null; do
      sleep 0.1 || true # a signal for all ends it, too
    done
    wait "$pid" || status=$?
    rm -f "$pid_file"
    echo "launch-status=$status"
    exit "$status"
    ;;
  stop) stop ;;
  *)
    echo "error: launch/tpu_vm.sh calls this; see the comment at its top" >&2
    exit 2
    ;;
esac
