#!/usr/bin/env bash
# Prepares a data set on a cluster that runs Apache Beam.
#
#   launch/prepare_beam.sh [--dry_run] dataflow|flink|spark --source=… --name=… …
#
# All flags behind the cluster's kind are those of vlp_jax.data.prepare. The
# source and --data_dir (or $TFDS_DATA_DIR) must be on a file system that this
# machine and all workers mount at the same path: NFS, Filestore, Lustre, or a
# bucket through its FUSE driver. Workers need `pip install 'vlp_jax[beam]'`.
#
#   dataflow   PROJECT, REGION, BUCKET (gs://…, for staging) and IMAGE, a
#              container image with vlp_jax[beam] that mounts the file system
#   flink      FLINK_MASTER, as host:8081
#   spark      SPARK_JOB_ENDPOINT, as host:8099: Beam's job server for Spark
#
# Flink and Spark find Beam's Python workers in a pool that runs on each of
# their machines: python -m apache_beam.runners.worker.worker_pool_main
# --service_port=50000
set -euo pipefail

dry_run=""
if [[ "${1:-}" == "--dry_run" ]]; then
  dry_run=1
  shift
fi

pool="environment_type=EXTERNAL,environment_config=localhost:50000"
case "${1:-}" in
  dataflow)
    options="runner=DataflowRunner"
    options+=",project=${PROJECT:?set PROJECT},region=${REGION:?set REGION}"
    options+=",temp_location=${BUCKET:?set BUCKET}/beam"
    options+=",sdk_container_image=${IMAGE:?set IMAGE}"
    ;;
  flink)
    options="runner=FlinkRunner,flink_master=${FLINK_MASTER:?set FLINK_MASTER}"
    options+=",$pool"
    ;;
  spark)
    options="runner=PortableRunner"
    options+=",job_endpoint=${SPARK_JOB_ENDPOINT:?set SPARK_JOB_ENDPOINT},$pool"
    ;;
  *)
    echo "usage: $0 [--dry_run] dataflow|flink|spark --source=PATH --name=NAME …" >&2
    exit 2
    ;;
esac
shift

command=(python -m vlp_jax.data.prepare "$@" "--beam_options=$options")
if [[ -n "$dry_run" ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
