#!/usr/bin/env bash
# DeepSpeed's launcher. One machine: launch/deepspeed.sh engine=zero3 experiment=mistral_7b key=value …
# NPROC ranks: by default one a GPU, or two processes on the CPU.
# Several machines: HOSTFILE=hosts, with a line `HOST slots=8` for each; either on one of them alone, which reaches the
# others by ssh and pdsh, or, without ssh, on each of them with NODE_RANK=0, 1, …, its place in the file.
# MASTER is the first host by default, and PORT 29500.
set -eu
. "$(dirname "$0")/node.sh"
deepspeed=("$python" -m deepspeed.launcher.runner --log_level error --no_local_rank)

if [ -n "${HOSTFILE:-}" ]; then
    hosts=$(awk '!/^[ \t]*(#|$)/' "$HOSTFILE")
    deepspeed+=(--hostfile "$HOSTFILE" --master_port "${PORT:-29500}")
    deepspeed+=(--master_addr "${MASTER:-$(awk 'NR == 1 { print $1 }' <<<"$hosts")}")
    if [ -z "${NODE_RANK:-}" ]; then
        exec "${deepspeed[@]}" --module plrd_train "$@"
    fi
    slots=$(awk -v line="$NODE_RANK" -F slots= 'NR == line + 1 { print $2 + 0 }' <<<"$hosts")
    if [ "${slots:-0}" -lt 1 ]; then
        echo "error: NODE_RANK=$NODE_RANK: $HOSTFILE has no such line of the form HOST slots=N (they count from 0)" >&2
        exit 2
    fi
    use_cores "$slots"
    deepspeed+=(--no_ssh --node_rank "$NODE_RANK")
else
    use_cores "$ranks"
    [ -n "${CUDA_VISIBLE_DEVICES:-}" ] || deepspeed+=(--num_gpus "$ranks") # it takes those that are visible
    free='import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
    deepspeed+=(--master_port "${PORT:-$("$python" -c "$free")}")
fi

# DeepSpeed gives its workers thirty seconds to end, and answers no HUP or USR1. So this script asks the workers to
# stop; they take the time that they need, and end with status 75. A second interrupt (Ctrl-C) kills them.
set -m # a process group of its own, which the terminal does not interrupt
"${deepspeed[@]}" --module plrd_train "$@" &
job=$!
stop() {
    trap 'kill -KILL -- -$job' INT
    pkill -TERM -P "$(pgrep -P "$job")" || kill -TERM -- "-$job" # before there are workers
}
trap stop TERM INT HUP USR1
# Not by `wait`, which loses the status when a trap interrupts it.
while kill -0 "$job" 2>/dev/null; do sleep 1 || true; done
status=0
wait "$job" || status=$?
exit "$status"
