#!/usr/bin/env bash
# Run the grid of launch/sweep.yaml without W&B: one run after another, then a table of them, best first.
#
#   launch/sweep.sh [FLAGS OF train_ddp.py]     e.g. launch/sweep.sh --epochs 4
#   SWEEP=mine.yaml launch/sweep.sh             another grid
#   NPROC=2 launch/sweep.sh                     processes of each run (default: as launch/local.sh)
#
# The run directories are in runs/sweep-DATE/. The sweep continues after a run that fails, for example because its lr is
# too high; Ctrl-C stops it. FOLDER=runs/sweep-DATE continues it.
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

# One line per run: its name, then its flags.
grid=$("$python" - "$sweep" <<'PYTHON'
import itertools, sys

import yaml

try:
    with open(sys.argv[1]) as file:
        sweep = yaml.safe_load(file)
    values = {name: each["values"] if "values" in each else [each["value"]] for name, each in sweep["parameters"].items()}
except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
    sys.exit(f"sweep.sh: error: {sys.argv[1]} is not a grid: {type(error).__name__}: {error}".splitlines()[0])
fixed = [part for part in sweep.get("command", []) if part.startswith("--") and not part.startswith("--wandb")]
for choice in itertools.product(*values.values()):
    chosen = dict(zip(values, choice))
    name = "_".join(f"{key}-{value}" for key, value in chosen.items())
    print(name, *fixed, *(f"--{key}={value}" for key, value in chosen.items()))
PYTHON
) || exit 2

mkdir -p "$folder"
# Ctrl-C reaches the run, too: it saves a checkpoint and stops.
trap 'echo "sweep.sh: stopped; to continue: FOLDER=$folder $0 $*"; exit 130' INT
count=$(wc -l <<<"$grid") number=0 failed=()
while read -r -a run; do
    number=$((number + 1))
    echo "sweep.sh: run $number of $count: ${run[*]:1} $*"
    "$root/launch/local.sh" --wandb=disabled "${run[@]:1}" --run-dir "$folder/${run[0]}" --autoresume "$@" </dev/null ||
        failed+=("${run[0]}")
done <<<"$grid"

echo
echo "sweep.sh: $count runs in $folder"
(( ${#failed[@]} == 0 )) || echo "sweep.sh: failed: ${failed[*]}"
compgen -G "$folder/*/config.json" >/dev/null || exit 1
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # if the package is not installed
"$python" -m cifar.compare "$folder" --out "$folder/compare.png"
exit $(( ${#failed[@]} > 0 ))
