#!/bin/sh
# A run on a slice of Cloud TPU VMs, one process a machine: sh examples/pods/tpu_vm.sh create|install|train|resume|delete
set -eu
NAME=garrulax ZONE=us-west4-a TYPE=v5litepod-64 VERSION=v2-alpha-tpuv5-lite

# RUN and CORPUS are in a file system that all machines mount: Filestore, or a bucket with Cloud Storage FUSE.
RUN=/shared/runs/mine MODEL=llama-7b CORPUS=/shared/text MESH=fsdp=16,tensor=4 SETTINGS="batch=64 steps=10000"

# The same command on every machine of the slice. JAX finds the other machines in the slice's metadata.
everywhere() { gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }
arguments="RUN=$RUN MODEL=$MODEL CORPUS=$CORPUS MESH=$MESH SETTINGS='$SETTINGS'"

case "$1" in
create)
    gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" --version="$VERSION"
    # train.sh and a wheel of garrulax (python -m build), to every machine
    gcloud compute tpus tpu-vm scp examples/pods/train.sh dist/*.whl "$NAME": --zone="$ZONE" --worker=all
    ;;
install) everywhere 'python3 -m pip install --user "jax[tpu]" ./*.whl' ;;
train) everywhere "export PATH=\$HOME/.local/bin:\$PATH; $arguments sh train.sh" ;;
resume) everywhere "export PATH=\$HOME/.local/bin:\$PATH; $arguments RESUME=1 sh train.sh" ;;
delete) gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE" ;;
esac
