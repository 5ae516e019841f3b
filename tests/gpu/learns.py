"""The part "learns": the accuracy and the seconds of every recipe on CIFAR-10 in $CIFAR_DATA_DIR.

Started by `repeat`, it trains a recipe several times in one process, so that all runs but the first find a warm device.
"""

import functools
import json
import statistics
import sys
import tempfile
from pathlib import Path

import train_ddp
from tests.gpu.campaign import MODULE, TRAIN, Campaign
from tests.helpers.measuring import now
from tests.helpers.parts import GPU
from tests.helpers.processes import result

# Flags, runs, least accuracy in percent of each run.
LEARNS = {
    "speed94": ("--precision bf16 --cuda-graph", 10, 93.4),
    "net-fast": ("--cuda-graph", 3, 60.0),
    "tutorial": ("--cuda-graph", 1, 54.0),
    "wide": ("--precision bf16 --cuda-graph", 1, 77.0),
    "resnet18": ("--precision bf16 --cuda-graph", 1, 94.0),
    "speed96": ("--precision bf16 --cuda-graph", 1, 95.6),
}


def learns(c: Campaign) -> None:
    """Train every recipe: speed94 alone, from a cold start and warm, then the others beside each other."""
    cold = [*TRAIN, *flags("speed94"), "--wandb", "disabled", "--run-dir", c.work / "cold"]
    finished = c.expect("cold start", cold)
    c.say("cold start seconds", f"{finished.seconds:.1f} s of wall clock")
    print(finished.output[-2500:], flush=True)
    repeat(c, 150, "speed94")
    others = [name for name in LEARNS if name != "speed94"]
    c.beside(len(others), [functools.partial(repeat, c, 400, name) for name in others])


def flags(recipe: str) -> list[str]:
    """Return the flags of train_ddp.py for a recipe."""
    words = [word for word in LEARNS[recipe][0].split() if GPU or word != "--cuda-graph"]
    return ["--recipe", recipe, *words, "--dataset", "cifar10"]


def repeat(c: Campaign, at_most: float, recipe: str) -> None:
    """Train a recipe as often as `LEARNS` says; each run must be accurate enough."""
    _, runs, least = LEARNS[recipe]
    out = c.out / f"{recipe}.jsonl"
    status = c.run(recipe, [*MODULE, "tests.gpu.learns", recipe, out], at_most).status
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    values = [100 * (row["test_accuracy_tta"] or row["test_accuracy"]) for row in rows]
    seconds = [round(row["train_seconds"], 2) for row in rows]
    if status != 0 or len(rows) != runs:
        c.say(recipe, f"FAIL status {status} after {len(rows)} of {runs} runs")
        return
    found = f"mean {statistics.mean(values):.2f} %, least {min(values):.2f} (at least {least}) of {runs} runs"
    c.say(recipe, f"{'PASS' if min(values) >= least else 'FAIL'} {found}; seconds {seconds}")


def train(recipe: str, out: Path) -> None:
    """Train a recipe with each of its seeds; append its result.json and the seconds of main() to `out`, a line each."""
    for seed in range(LEARNS[recipe][1]):
        with tempfile.TemporaryDirectory() as directory:
            own = [*flags(recipe), "--wandb", "disabled", "--seed", str(seed), "--run-dir", f"{directory}/run"]
            began = now()
            train_ddp.main(own)
            row = {"flags": own, "seed": seed, "main_seconds": now() - began, **result(Path(directory) / "run")}
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]))
