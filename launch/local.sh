#!/usr/bin/env bash
# Train on this host: one process on each GPU, or one on the CPU where there is none.
#
#   launch/local.sh [FLAGS OF train_ddp.py]     e.g. launch/local.sh --recipe wide --epochs 3
#   NPROC=2 launch/local.sh                     two processes, whatever the host has
#
# Use it to start a run by hand; it is no more than the torchrun line you would type.
set -euo pipefail

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0"
    echo "The flags of train_ddp.py: python train_ddp.py --help"
    exit 0
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v python || command -v python3)
nproc=${NPROC:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
if [[ ! "$nproc" =~ ^[1-9][0-9]*$ ]]; then
    echo "local.sh: error: NPROC is '$nproc': it must be a number of processes such as 2" >&2
    exit 2
fi

if [[ "$nproc" == 1 ]]; then
    exec "$python" "$root/train_ddp.py" "$@"
fi
# SIGUSR1, too, is for torchrun to pass on: by default it would only kill torchrun.
exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$nproc" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "$root/train_ddp.py" "$@"
