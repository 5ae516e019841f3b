"""Compare the model of scale.py with runs of 1, 2 and 4 processes over gloo on this machine's CPU.

    python -m tests.benchmarks.scale_check

Reads CIFAR-10 from $CIFAR_DATA_DIR, or data/. Under torchrun, time the all-reduce alone and print JSON.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from tests.benchmarks.runner import Runner, last_json
from tests.benchmarks.scale import Link, all_reduce_seconds, fit, gradient_bytes
from tests.helpers.measuring import images_per_second

SIZES = tuple(4**k * 1024 for k in range(8))  # 1 KiB to 16 MiB
PROCESSES = (1, 2, 4)
LOCAL_BATCHES = {"net": 128, "net-wide": 64}
ROUNDS = 3


def fit_link(measured: Sequence[tuple[int, int, float]]) -> Link:
    """Return the link that fits all-reduces, (processes, bytes, seconds).

    Short messages determine alpha, long ones the bandwidth.
    """
    messages = [(2 * (p - 1), 2 * (p - 1) * size / p) for p, size, _ in measured]
    alpha, beta = fit(messages, [seconds for *_, seconds in measured])
    return Link("gloo", alpha, 1 / beta)


def time_all_reduce() -> list[tuple[int, int, float]]:
    """Return (processes, bytes, median seconds) of an all-reduce at each of `SIZES`. Collective."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    measured = []
    for size in SIZES:
        tensor, times = torch.ones(size // 4), []
        for _ in range(25):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(tensor)
            times.append(time.perf_counter() - began)
        measured.append((dist.get_world_size(), size, statistics.median(times[5:])))
    dist.destroy_process_group()
    return measured


def main() -> None:
    """Measure, predict, train, and print the errors."""
    data_dir = Path(os.environ.get("CIFAR_DATA_DIR") or "data").resolve()
    all_reduces: list[tuple[int, int, float]] = []
    steps: dict[tuple[str, int], list[float]] = {(model, p): [] for model in LOCAL_BATCHES for p in PROCESSES}
    with tempfile.TemporaryDirectory(prefix="scale-") as directory:
        runner = Runner(data_dir, Path(directory))
        for _ in range(ROUNDS):  # alternating, so that other load on the machine affects all of them alike
            for p in PROCESSES[1:]:
                process = runner.python("-m", "tests.benchmarks.scale_check", processes=p, threads=1)
                all_reduces += last_json(process)["measured"]
            for (model, p), seconds in steps.items():
                seconds.append(seconds_of_a_step(runner, model, p))
    link = fit_link(all_reduces)
    print(f"gloo here: alpha {1e6 * link.alpha:.0f} us, {link.bandwidth / 1e9:.2f} GB/s")
    print(f"{'model':10}{'processes':>10}{'predicted ms':>14}{'measured ms':>14}{'error':>8}")
    cores = os.cpu_count() or 1
    for (model, p), seconds in steps.items():
        alone, real = statistics.median(steps[model, 1]), statistics.median(seconds)
        # A CPU launches its kernels by calling them: one process's step holds both. If there are more processes than
        # cores, they take turns.
        predicted = alone * max(1, p / cores) + all_reduce_seconds(p, gradient_bytes(model), link)
        error = 100 * (predicted / real - 1)
        print(f"{model:10}{p:>10}{1000 * predicted:>14.1f}{1000 * real:>14.1f}{error:>+7.0f} %")


def seconds_of_a_step(runner: Runner, model: str, processes: int) -> float:
    """Train a model, and return the seconds of a step."""
    batch = LOCAL_BATCHES[model]
    flags = ("--recipe", "wide", "--model", model, "--local-batch-size", batch, "--lr-scaling", "none")
    work = ("--max-steps", 120, "--log-steps", 40, "--device", "cpu")
    _, run_dir = runner.train(*flags, *work, processes=processes, threads=1)
    return batch * processes / images_per_second(run_dir)


if __name__ == "__main__":
    if "RANK" not in os.environ:
        main()
    else:
        found = time_all_reduce()
        if os.environ["RANK"] == "0":
            print(json.dumps({"measured": found}), flush=True)
