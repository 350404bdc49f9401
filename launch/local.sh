#!/usr/bin/env bash
# One machine: launch/local.sh experiment=quickstart key=value …    NPROC ranks: by default one a GPU, or two processes on the CPU.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python)
gpus=$(nvidia-smi -L 2>/dev/null | grep -c . || true)
ranks=${NPROC:-$([ "$gpus" -gt 0 ] && echo "$gpus" || echo 2)}
# Ranks x threads = cores: oversubscription slows everything several times.
threads=$(($(nproc 2>/dev/null || sysctl -n hw.ncpu) / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
exec "$python" -m plrd_train.torchrun --standalone --nproc_per_node "$ranks" -m plrd_train "$@"
