#!/usr/bin/env bash
# One student on all GPUs of this machine, or of several: run the same line on each of them.
#
#   launch/torchrun/student.sh workdir=runs/eft name=student top=fc_sc
#   NODES=2 HEAD=node-1:29500 GPUS=8 launch/torchrun/student.sh workdir=/shared/eft trainer.num_nodes=2
#   NODES=1:4 HEAD=node-1:29500 GPUS=8 launch/torchrun/student.sh workdir=/shared/eft \
#       trainer.devices=auto trainer.num_nodes=auto
#
# With NODES=1:4 a machine that starts the line later joins, and when one is stopped the others go on without it: all save at the
# end of a step and start anew together, which takes 30 to 60 seconds (PET_RDZV_CONF=last_call_timeout=5 shortens it). Without the
# first machine, at which they meet, all end with 75.
#
# Stopped in the middle, it continues from its last checkpoint when started again, with any number of GPUs. On SIGTERM it saves
# and exits with 75.
set -euo pipefail
if [ -z "${GPUS:-}" ] && ! GPUS=$(set -o pipefail; nvidia-smi --list-gpus 2>/dev/null | wc -l); then
    echo "$0: nvidia-smi, which counts the GPUs, does not work here; give their number, GPUS=8, or without any the number of" \
        "processes and the trainer, GPUS=2 $0 trainer=cpu" >&2
    exit 2
fi
if ! [[ $GPUS =~ ^[1-9][0-9]*$ && ${NODES:-1} =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]]; then
    echo "$0: GPUS=$GPUS NODES=${NODES:-1}: expected the number of GPUS of a machine, and of machines, 2 or 1:4 say" >&2
    exit 2
fi
exec python "$(dirname "$0")/run.py" \
    --nnodes="${NODES:-1}" \
    --nproc-per-node="$GPUS" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="${HEAD:-localhost:29500}" \
    -m concentration.cli student trainer=gpu trainer.devices="$GPUS" "$@"
