# Sourced by the launchers: $python; $ranks of this machine; and use_cores, which shares its cores out among them.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python)

gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[0-9GM]' || true # numbers, GPU-… or MIG-…; -1 is none
    else
        nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
    fi
}
# NPROC, by default one a GPU, or two processes on the CPU.
ranks=${NPROC:-$(gpus)}
[ "$ranks" -gt 0 ] || ranks=2

# Ranks x threads = cores: oversubscription slows everything several times.
use_cores() {
    local threads=$(($(nproc 2>/dev/null || sysctl -n hw.ncpu) / $1))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
}
