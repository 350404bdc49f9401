#!/usr/bin/env bash
# Several machines, this command on each of them alike:
#   NNODES=4 RDZV=host0 launch/torchrun.sh experiment=mistral_7b key=value …
# RDZV is one of the machines, by a name or address that all of them reach it by; its port is 29400 unless
# RDZV=host0:PORT gives another.
# NPROC ranks on each: by default one a GPU, or two processes on the CPU.
set -eu
. "$(dirname "$0")/node.sh"
use_cores "$ranks"
exec "$python" -m plrd_train.runtime.torchrun --nnodes "${NNODES:?how many machines}" --nproc_per_node "$ranks" \
    --rdzv_backend c10d --rdzv_endpoint "${RDZV:?host or host:port of one of the machines}" -m plrd_train "$@"
