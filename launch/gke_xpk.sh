#!/usr/bin/env bash
# Trains on TPUs of GKE, through xpk; one slice or several.
#
#   launch/gke_xpk.sh ACTION --cluster=NAME --zone=ZONE [flags] [-- COMMAND…]
#
#   create    makes a cluster with the slices: billed until `delete`
#   run       submits COMMAND as a workload, and waits for its end
#   status    lists the workloads
#   cancel    ends the workload; COMMAND saves itself
#   delete    deletes the cluster
#
#   --cluster=NAME         of the cluster
#   --zone=ZONE            such as us-east5-b
#   --project=PROJECT      (default: gcloud's)
#   --accelerator=TYPE     such as v6e-16; create and run need it
#   --num_slices=N         more than one is multislice (default 1)
#   --spot                 create: cheaper, and may be preempted
#   --reservation=NAME     create: from a reservation, instead
#   --name=NAME            of the workload; run and cancel need it
#   --image=IMAGE          run: container image with vlp_jax[tpu]; docs/launch.md
#   --storage=NAME         run: storage that outlives the pods; `xpk storage list`
#   --env=FILE             environment of COMMAND (default launch/env/tpu.env)
#   --max_restarts=R       at most R restarts after preemptions (default 100)
#   --dry_run              print the commands, run nothing
#
# COMMAND's --workdir must be below the mount point of --storage, so that it
# outlives the pods: docs/launch.md.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$here/common.sh"

flags=(
  [cluster]="" [zone]="" [project]="" [accelerator]="" [num_slices]=1 [spot]=no
  [reservation]="" [name]="" [image]="" [storage]="" [env]="$here/env/tpu.env"
  [max_restarts]=100 [dry_run]=no
)
parse "$@"
((${#words[@]} == 1)) || fail "say one action: $0 create … (--help shows all)"
need cluster zone
need_whole num_slices max_restarts
where=("--cluster=${flags[cluster]}" "--zone=${flags[zone]}")
[[ -z "${flags[project]}" ]] || where+=("--project=${flags[project]}")

# A pod that is evicted gets SIGTERM, and this long to save itself: seconds.
readonly grace=300

create() {
  local capacity=--on-demand
  need accelerator
  [[ "${flags[spot]}" == no ]] || capacity=--spot
  [[ -z "${flags[reservation]}" ]] ||
    capacity="--reservation=${flags[reservation]}"
  run xpk cluster create "${where[@]}" "--tpu-type=${flags[accelerator]}" \
    "--num-slices=${flags[num_slices]}" "$capacity"
}

# Kubernetes starts all pods again when one ends with 75, with 69 (another one is
# lost), with 42, or by a signal. Any other status of any pod ends the workload:
# a mistake (2), or a bug.
submit() {
  local setting options=()
  for setting in "${settings[@]}"; do
    options+=("--env=$setting")
  done
  [[ -z "${flags[storage]}" ]] || options+=("--storage=${flags[storage]}")
  # xpk signals its command's shell: exec puts the command in its place.
  run xpk workload create "${where[@]}" "--workload=${flags[name]}" \
    "--tpu-type=${flags[accelerator]}" "--num-slices=${flags[num_slices]}" \
    "--docker-image=${flags[image]}" "${options[@]}" \
    "--max-restarts=${flags[max_restarts]}" \
    "--restart-on-exit-codes=$PREEMPTED,$LOST" \
    "--termination-grace-period-seconds=$grace" \
    "--command=exec $(quote "${command[@]}")"
}

case "${words[0]}" in
  create) create ;;
  run)
    need name accelerator image
    need_command
    read_env "${flags[env]}"
    submit
    run xpk workload list "${where[@]}" \
      "--wait-for-job-completion=${flags[name]}"
    ;;
  status) run xpk workload list "${where[@]}" ;;
  cancel)
    need name
    run xpk workload delete "${where[@]}" "--workload=${flags[name]}" --force
    ;;
  delete) run xpk cluster delete "${where[@]}" --force ;;
  *) fail "no action \"${words[0]}\"; --help shows them" ;;
esac
