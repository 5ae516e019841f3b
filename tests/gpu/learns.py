"""The part "learns": the accuracy and the seconds of every recipe on CIFAR-10 in $CIFAR_DATA_DIR."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from tests.gpu.campaign import MODULE, TRAIN, Campaign

# Recipe and flags, runs, least accuracy in percent of each run.
LEARNS = {
    "speed94": ("speed94 --precision bf16 --cuda-graph", 10, 93.4),
    "net-fast": ("net-fast --cuda-graph", 3, 60.0),
    "tutorial": ("tutorial --cuda-graph", 1, 54.0),
    "wide": ("wide --precision bf16 --cuda-graph", 1, 77.0),
    "resnet18": ("resnet18 --precision bf16 --cuda-graph", 1, 94.0),
    "speed96": ("speed96 --precision bf16 --cuda-graph", 1, 95.6),
}


def learns(c: Campaign) -> None:
    """Train every recipe: speed94 alone, from a cold start and warm, then the others beside each other."""
    graph = torch.cuda.is_available()
    data = ["--dataset", "cifar10"]

    def repeat(name: str, at_most: float) -> None:
        flags, runs, least = LEARNS[name]
        words = [word for word in flags.split() if graph or word != "--cuda-graph"]
        out = c.out / f"{name}.jsonl"
        command = [*MODULE, "tests.gpu.repeat", f"--runs={runs}", f"--out={out}", "--recipe", *words, *data]
        status, output = c.run(name, command, at_most)
        rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        values = [100 * (row["test_accuracy_tta"] or row["test_accuracy"]) for row in rows]
        passed = status == 0 and len(rows) == runs and min(values, default=0) >= least
        seconds = [round(row["train_seconds"], 2) for row in rows]
        mean = sum(values) / max(1, len(values))
        found = f"mean {mean:.2f} %, least {min(values, default=0):.2f} (at least {least}) of {len(rows)} runs"
        c.say(name, f"{'PASS' if passed else 'FAIL'} {found}; seconds {seconds}")
        if status:
            print(output[-1500:], flush=True)

    flags = [word for word in LEARNS["speed94"][0].split() if graph or word != "--cuda-graph"]
    began = time.perf_counter()
    output = c.expect(
        "cold start", [*TRAIN, "--recipe", *flags, *data, "--wandb", "disabled", "--run-dir", c.work / "cold"]
    )
    c.say("cold start seconds", f"{time.perf_counter() - began:.1f} s of wall clock")
    print(output[-2500:], flush=True)
    repeat("speed94", 150)
    others = [name for name in LEARNS if name != "speed94"]
    c.at_once = len(others)
    with ThreadPoolExecutor(c.at_once) as pool:
        list(pool.map(lambda name: repeat(name, 400), others))
