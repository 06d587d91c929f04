#!/bin/sh
# A run on TPUs of a GKE cluster that xpk made, one process a machine: sh examples/pods/xpk.sh [RESUME=1]
set -eu
CLUSTER=mine ZONE=us-west4-a PROJECT=mine TYPE=v5litepod-64
IMAGE=us-docker.pkg.dev/mine/images/garrulax:1 # has garrulax, jax[tpu] and examples/pods/train.sh in /garrulax

# /shared is a storage of the cluster (xpk storage attach), which all machines mount.
SETTINGS="RUN=/shared/runs/mine MODEL=llama-7b CORPUS=/shared/text MESH=fsdp=16,tensor=4 SETTINGS='batch=64 steps=10000'"

# GKE gives each pod of a TPU workload the names of all of them and its own number, which JAX reads.
xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="garrulax-$(date +%s)" \
    --tpu-type="$TYPE" --num-slices=1 --docker-image="$IMAGE" --command="$SETTINGS ${1:-} sh /garrulax/train.sh"
