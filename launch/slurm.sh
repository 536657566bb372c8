#!/usr/bin/env bash
# Trains on GPUs of a Slurm cluster: one process for each GPU.
#
#   launch/slurm.sh --name=NAME [flags] -- python -m vlp_jax.main --config=…
#
#   --name=NAME            of the job
#   --nodes=N              (default 1)
#   --gpus_per_node=G      (default 8)
#   --cpus_per_task=C      of each process, for its data (default 8)
#   --time=LIMIT           such as 24:00:00 (default: the partition's)
#   --partition=PARTITION  (default: the cluster's)
#   --account=ACCOUNT      (default: yours)
#   --env=FILE             environment of COMMAND (default launch/env/gpu.env)
#   --max_restarts=R       at most R restarts after preemptions (default 100)
#   --dry_run              print the command, run nothing
#
# Run it in the tree, with vlp_jax[cuda] installed and active. launch/slurm.sbatch
# is the job; its log is slurm-JOB.out. `scancel JOB` ends it.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$here/common.sh"

flags=(
  [name]="" [nodes]=1 [gpus_per_node]=8 [cpus_per_task]=8 [time]=""
  [partition]="" [account]="" [env]="$here/env/gpu.env" [max_restarts]=100
  [dry_run]=no
)
parse "$@"
((${#words[@]} == 0)) || fail "unexpected \"${words[0]}\"; --help says how"
need name
need_whole nodes gpus_per_node cpus_per_task max_restarts
need_command
read_env "${flags[env]}"

options=()
for option in time partition account; do
  [[ -z "${flags[$option]}" ]] || options+=("--$option=${flags[$option]}")
done
run sbatch "--job-name=${flags[name]}" "--nodes=${flags[nodes]}" \
  "--ntasks-per-node=${flags[gpus_per_node]}" \
  "--gpus-per-node=${flags[gpus_per_node]}" \
  "--cpus-per-task=${flags[cpus_per_task]}" "${options[@]}" \
  "$here/slurm.sbatch" "${flags[max_restarts]}" \
  env "${settings[@]}" "${command[@]}"
