#!/usr/bin/env bash
# Trains on one machine with GPUs, of any cloud: a managed job of SkyPilot.
#
#   launch/skypilot.sh ACTION --name=NAME [flags] [-- COMMAND…]
#
#   run       submits COMMAND, and shows its log; SkyPilot restarts it, elsewhere
#             if need be, and gives the machine back at its end
#   status    lists the jobs
#   logs      shows the log
#   cancel    ends the job, and gives the machine back
#
#   --name=NAME            of the job
#   --bucket=URI           run: gs://… or s3://…, mounted at /runs; it exists
#   --gpus=TYPE:COUNT      run: of the machine (default H100:8)
#   --infra=CLOUD          run: such as gcp/us-central1 (default: the cheapest)
#   --spot                 run: cheaper, and may be preempted
#   --env=FILE             environment of COMMAND (default launch/env/gpu.env)
#   --dry_run              print the command, run nothing
#
# Run it in the tree, which is copied. Give COMMAND a --workdir below /runs: all
# else is lost with the machine. Several machines want a file system that they
# share: launch/slurm.sh. What the job is: launch/skypilot.yaml.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$here/common.sh"

flags=(
  [name]="" [bucket]="" [gpus]=H100:8 [infra]="" [spot]=no
  [env]="$here/env/gpu.env" [dry_run]=no
)
parse "$@"
((${#words[@]} == 1)) || fail "say one action: $0 run … (--help shows all)"
need name

launch() {
  local options=()
  [[ -z "${flags[infra]}" ]] || options+=("--infra=${flags[infra]}")
  [[ "${flags[spot]}" == no ]] || options+=(--use-spot)
  run sky jobs launch --yes "--name=${flags[name]}" "--gpus=${flags[gpus]}" \
    "${options[@]}" "--env=BUCKET=${flags[bucket]}" \
    "--env=COMMAND=$(quote env "${settings[@]}" "${command[@]}")" \
    "$here/skypilot.yaml"
}

case "${words[0]}" in
  run)
    need bucket
    need_command
    read_env "${flags[env]}"
    launch
    ;;
  status) run sky jobs queue ;;
  logs) run sky jobs logs -n "${flags[name]}" ;;
  cancel) run sky jobs cancel --yes -n "${flags[name]}" ;;
  *) fail "no action \"${words[0]}\"; --help shows them" ;;
esac
