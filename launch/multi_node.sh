#!/usr/bin/env bash
# Train on several hosts: run the same command on each of them.
#
#   launch/multi_node.sh HOST[:PORT] NODES [FLAGS OF train_ddp.py]
#   launch/multi_node.sh 10.0.0.1 2 --recipe wide     two hosts; the rendezvous is on 10.0.0.1, one of them
#   launch/multi_node.sh 10.0.0.1 1:4                 one to four hosts, which may leave and return
#   NPROC=2 MAX_RESTARTS=10 launch/multi_node.sh ...  processes per host (default: its GPUs, else 1); restarts (3)
#
# For hosts that reach each other by TCP, without a scheduler. Rank zero, on the host whose address sorts first, writes
# the run directory: if all hosts share it, any host but HOST may leave. The data directory may be shared or not: of the
# hosts that share one, one downloads.
set -euo pipefail

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
    sed -n '2,11s/^# \{0,1\}//p' "$0"
    echo "The flags of train_ddp.py: python train_ddp.py --help"
    exit 0
fi

fail() {
    echo "multi_node.sh: error: $*" >&2
    exit 2
}

[[ $# -ge 2 ]] || fail "missing arguments: launch/multi_node.sh HOST[:PORT] NODES [FLAGS]"
endpoint=$1 nodes=$2
shift 2
[[ "$nodes" =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || fail "'$nodes' is not a number of hosts, such as 2, or a range, such as 1:4"
(( ${nodes%%:*} <= ${nodes##*:} )) || fail "'$nodes': write the range as MIN:MAX"
[[ "$endpoint" != *:*:* || "$endpoint" == \[* ]] || endpoint="[$endpoint]"  # IPv6 without a port
[[ "$endpoint" =~ ^([^]:[]+|\[[^]]+\])(:([0-9]+))?$ ]] ||
    fail "'$endpoint' is not an address, such as 10.0.0.1, 10.0.0.1:29400 or [fd00::1]:29400"
host=${BASH_REMATCH[1]} port=${BASH_REMATCH[3]:-29400}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v python || command -v python3)
nproc=${NPROC:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
[[ "$nproc" =~ ^[1-9][0-9]*$ ]] || fail "NPROC is '$nproc': set it to a number of processes, such as 2"

# The address from which this host reaches HOST: by default torchrun and gloo resolve the host's own name, often to
# 127.0.0.1. If it is HOST's address, then this host is HOST, under whatever name.
mine=$("$python" - "$host" "$port" <<'PYTHON'
import socket, sys

host, port = sys.argv[1].strip("[]"), int(sys.argv[2])
try:
    family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # UDP: sends nothing
        mine = probe.getsockname()[0]
        print(mine, int(mine == target[0]))
except (OSError, OverflowError) as error:
    sys.exit(f"multi_node.sh: error: cannot reach {host}:{port} from this host: {error}")
PYTHON
) || exit 2
read -r address is_host <<<"$mine"
if command -v ip >/dev/null; then
    device=$(ip -o address show to "$address" | awk 'NR == 1 { print $2 }')
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$device}
    # NCCL takes a name for a prefix, unless "=" is before it. What an administrator has chosen in a file stays.
    grep -qs NCCL_SOCKET_IFNAME /etc/nccl.conf ~/.nccl.conf || export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-"=$device"}
fi

# torchrun waits without a word until all hosts are there; then it has ranks for children. The notice ends within a
# second of either, for a pipe that it inherits stays open as long as it does.
if [[ "$nodes" != 1 ]] && command -v pgrep >/dev/null; then
    ( (
        for ((waited = 1; ; waited++)); do
            sleep 1
            kill -0 $$ 2>/dev/null || exit 0
            ! pgrep -P $$ '^[rp]' >/dev/null || exit 0 # "rank 0" or "python", not "fork server"
            ((waited % 30 != 5)) || echo "multi_node.sh: waiting at $host:$port for $nodes hosts in all ($waited s)" >&2
        done
    ) & )
fi

# By default torchrun dies of SIGUSR1, and of SIGHUP even under nohup.
signals=SIGTERM,SIGINT,SIGQUIT,SIGUSR1
[[ -n "$(trap -p HUP)" ]] || signals+=,SIGHUP
# With the store shared by torchrun and its workers, the default, a host that returns hangs (seen with torch 2.14).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
[[ "$nproc" == 1 ]] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -u "$root/launch/warm_torchrun.py" --nnodes="$nodes" --nproc_per_node="$nproc" \
    --rdzv-backend=c10d --rdzv-endpoint="$host:$port" --rdzv-id="${RUN_ID:-cifar-ddp}" \
    --rdzv-conf="is_host=$is_host,last_call_timeout=5" --local-addr="$address" \
    --max-restarts="${MAX_RESTARTS:-3}" --signals-to-handle="$signals" \
    "$root/train_ddp.py" "$@"
