"""The model of scale.py against real runs on this machine's CPU, with 1, 2 and 4 processes over gloo.

torchrun --nproc_per_node=2 -m tests.benchmarks.scale_check        # the all-reduce alone
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.children import python, run_windows, steady, train
from tests.benchmarks.scale import Link, all_reduce_seconds, gradient_bytes

SIZES = tuple(4**k * 1024 for k in range(8))  # 1 KiB to 16 MiB
PROCESSES = (1, 2, 4)
MODELS = {"net": 128, "net-wide": 64}  # local batches
ROUNDS = 3


def fit(measured: Sequence[tuple[int, int, float]]) -> Link:
    """The link that fits (processes, bytes, seconds) of all-reduces best.

    The squared relative errors are the smallest, so that short messages, which say what alpha is, count as much as
    long ones, which say what the bandwidth is.
    """
    import torch

    messages = [(2 * (p - 1), 2 * (p - 1) * size / p) for p, size, _ in measured]
    seconds = torch.tensor([t for *_, t in measured], dtype=torch.float64)
    rows = torch.tensor(messages, dtype=torch.float64) / seconds[:, None]
    alpha, beta = torch.linalg.lstsq(rows, torch.ones(len(rows), 1, dtype=torch.float64)).solution.flatten().tolist()
    return Link("gloo", alpha, 1 / beta)


def time_all_reduce() -> list[tuple[int, int, float]]:
    """(processes, bytes, median seconds) of an all-reduce at each of `SIZES`; every rank calls it."""
    import torch
    import torch.distributed as dist

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


def check(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Measure, predict, run, and print the errors."""
    data_dir = Path(os.environ.get("CIFAR_DATA_DIR") or "data").resolve()
    if not (data_dir / "cifar-10-batches-py").is_dir():
        parser.error(f"no cifar-10-batches-py in {data_dir}: name its folder with $CIFAR_DATA_DIR")
    cores = os.cpu_count() or 1
    steps: dict[tuple[str, int], list[float]] = {(net, p): [] for net in MODELS for p in PROCESSES}
    measured: list[tuple[int, int, float]] = []
    with tempfile.TemporaryDirectory(prefix="scale-") as name:
        folder = Path(name)
        for _ in range(ROUNDS):  # in turns, so that what else the machine does falls on all alike
            for p in PROCESSES[1:]:
                child = python("-m", "tests.benchmarks.scale_check", cwd=folder, processes=p, threads=1)
                measured += [(p, size, seconds) for p, size, seconds in child.last_json()["measured"]]
            for net, p in steps:
                flags = ("--recipe", "wide", "--model", net, "--local-batch-size", MODELS[net], "--lr-scaling", "none")
                work = ("--max-steps", 120, "--log-steps", 40, "--device", "cpu")
                _, run_dir = train(folder, data_dir, *flags, *work, processes=p, threads=1)
                steps[net, p].append(MODELS[net] * p / steady(run_windows(run_dir)))
    link = fit(measured)
    print(f"gloo here: alpha {1e6 * link.alpha:.0f} us, {link.bandwidth / 1e9:.2f} GB/s, from {len(measured)} medians")
    print(f"{'net':10}{'processes':>10}{'predicted ms':>14}{'measured ms':>14}{'error':>8}")
    rows = []
    for (net, p), times in steps.items():
        alone, real = statistics.median(steps[net, 1]), statistics.median(times)
        # More processes than cores take turns.
        predicted = alone * max(1, p / cores) + all_reduce_seconds(p, gradient_bytes(net), link)
        error = 100 * (predicted / real - 1)
        print(f"{net:10}{p:>10}{1000 * predicted:>14.1f}{1000 * real:>14.1f}{error:>+7.0f} %")
        rows.append({"net": net, "processes": p, "predicted": predicted, "measured": times, "error_percent": error})
    return {"link": vars(link), "all_reduce": measured, "steps": rows, "cores": cores}


if __name__ == "__main__":
    found = time_all_reduce()
    if os.environ.get("RANK") == "0":
        print(json.dumps({"measured": found}), flush=True)
