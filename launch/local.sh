#!/usr/bin/env bash
# One machine: launch/local.sh experiment=quickstart key=value …
# NPROC ranks: by default one a GPU, or two processes on the CPU.
set -eu
. "$(dirname "$0")/node.sh"
use_cores "$ranks"
exec "$python" -m plrd_train.runtime.torchrun --standalone --nproc_per_node "$ranks" -m plrd_train "$@"
