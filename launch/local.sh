#!/usr/bin/env bash
# Train on this host: one process per GPU, or one CPU process if there is no GPU.
#
#   launch/local.sh [FLAGS OF train_ddp.py]     e.g. launch/local.sh --recipe wide --epochs 3
#   NPROC=2 launch/local.sh                     two processes, on GPUs or on the CPU
#   MAX_RESTARTS=3 launch/local.sh              restart up to three times after a failure (default: 0)
#
# The same as: torchrun --standalone --nproc_per_node=N --max-restarts=M train_ddp.py [FLAGS], but restarts are warm.
set -euo pipefail

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0"
    echo "The flags of train_ddp.py: python train_ddp.py --help"
    exit 0
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v python || command -v python3)
nproc=${NPROC:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
if [[ ! "$nproc" =~ ^[1-9][0-9]*$ ]]; then
    echo "local.sh: error: NPROC is '$nproc': set it to a number of processes, such as 2" >&2
    exit 2
fi

if [[ "$nproc" == 1 ]]; then
    exec "$python" "$root/train_ddp.py" "$@"
fi
# By default torchrun dies of SIGUSR1, and of SIGHUP even under nohup.
signals=SIGTERM,SIGINT,SIGQUIT,SIGUSR1
[[ -n "$(trap -p HUP)" ]] || signals+=,SIGHUP
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# The address, as this host's own name may lead elsewhere, or nowhere.
exec "$python" -u "$root/launch/warm_torchrun.py" --standalone --local-addr=127.0.0.1 --nproc_per_node="$nproc" \
    --max-restarts="${MAX_RESTARTS:-0}" --signals-to-handle="$signals" \
    "$root/train_ddp.py" "$@"
