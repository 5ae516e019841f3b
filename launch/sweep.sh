#!/usr/bin/env bash
# The grid of launch/sweep.yaml without W&B's server: one run after the other, then a table of them, the best first.
#
#   launch/sweep.sh [FLAGS OF train_ddp.py]     e.g. launch/sweep.sh --epochs 4
#   SWEEP=mine.yaml launch/sweep.sh             another grid
#   NPROC=2 launch/sweep.sh                     processes of each run (default: as launch/local.sh)
#
# Use it to try a few settings on one host. Its runs are in runs/sweep-DATE/. A run that fails, for its lr is too high,
# say, doesn't end the sweep; Ctrl-C does. Started again with FOLDER=runs/sweep-DATE, it goes on where it was.
set -euo pipefail

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    echo "The flags of train_ddp.py: python train_ddp.py --help"
    exit 0
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v python || command -v python3)
sweep=${SWEEP:-$root/launch/sweep.yaml}
folder=${FOLDER:-runs/sweep-$(date +%Y-%m-%d_%H-%M-%S)}

# One line for each run: its name, then its flags.
grid=$("$python" - "$sweep" <<'PYTHON'
import itertools, sys

import yaml

try:
    with open(sys.argv[1]) as file:
        sweep = yaml.safe_load(file)
    values = {name: each["values"] if "values" in each else [each["value"]] for name, each in sweep["parameters"].items()}
except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
    sys.exit(f"sweep.sh: error: {sys.argv[1]} is no grid: {type(error).__name__}: {error}".splitlines()[0])
fixed = [part for part in sweep.get("command", []) if part.startswith("--") and not part.startswith("--wandb")]
for choice in itertools.product(*values.values()):
    chosen = dict(zip(values, choice))
    name = "_".join(f"{key}-{value}" for key, value in chosen.items())
    print(name, *fixed, *(f"--{key}={value}" for key, value in chosen.items()))
PYTHON
) || exit 2

mkdir -p "$folder"
# Ctrl-C reaches the run as well: it saves a checkpoint and ends, and then the sweep ends, too.
trap 'echo "sweep.sh: stopped; to go on: FOLDER=$folder $0 $*"; exit 130' INT
count=$(wc -l <<<"$grid") number=0 failed=()
while read -r -a run; do
    number=$((number + 1)) run_dir=$folder/${run[0]}
    echo "sweep.sh: run $number of $count: ${run[*]:1} $*"
    if [[ -e "$run_dir/result.json" ]]; then
        echo "sweep.sh: done before"
    elif [[ -e "$run_dir/config.json" ]] && compgen -G "$run_dir/checkpoints/step-*.pt" >/dev/null; then
        "$root/launch/local.sh" --resume "$run_dir" </dev/null || failed+=("${run[0]}")
    else
        rm -rf "$run_dir"
        "$root/launch/local.sh" --wandb=disabled "${run[@]:1}" --run-dir "$run_dir" "$@" </dev/null || failed+=("${run[0]}")
    fi
done <<<"$grid"

echo
echo "sweep.sh: $count runs in $folder"
(( ${#failed[@]} == 0 )) || echo "sweep.sh: failed: ${failed[*]}"
compgen -G "$folder/*/config.json" >/dev/null || exit 1
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # should the package not be installed
"$python" -m cifar.compare "$folder" --out "$folder/compare.png"
exit $(( ${#failed[@]} > 0 ))
