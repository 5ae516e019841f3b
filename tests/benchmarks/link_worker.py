"""Train by each method in one of two processes, which `slow_link` starts; rank zero prints a line of JSON for each.

A method is a communication hook, such as powersgd-RANK, or local-STEPS: local SGD (Stich 2019, arXiv 1805.09767), in
which each process updates its own weights by its own images, and averages the weights every STEPS steps, the momentum
never.
"""

import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from torch.distributed.algorithms.model_averaging.utils import average_parameters

from cifar.distributed.ddp import ddp_options, settle_buckets, unwrap
from cifar.evaluation import evaluate
from cifar.recipes import config_from_recipe
from tests.helpers.parts import Parts
from train_ddp import train_step


def build(method: str, recipe: str, seed: int, **powersgd: int) -> Parts:
    """Return the parts of a training by `method`, with half of the recipe's global batch a process."""
    kind, _, number = method.partition("-")
    batch = config_from_recipe(recipe).lr_batch_size
    options = ddp_options("none" if kind == "local" else kind)
    if kind == "powersgd":
        options.comm_state_option |= {"matrix_approximation_rank": int(number)} | powersgd
    with patch("cifar.distributed.ddp.ddp_options", lambda *_, **__: options):
        data_dir = Path(os.environ.get("CIFAR_DATA_DIR", "data"))
        batches: dict[str, Any] = {"global_batch_size": batch, "local_batch_size": batch // 2}
        parts = Parts(recipe, "cpu", dataset="cifar10", data_dir=data_dir, seed=seed, **batches)
    if kind == "local":
        parts.model = unwrap(parts.model)

        def local_step(*arguments: Any) -> Any:
            loss = train_step(*arguments)
            if (parts.state.step + 1) % int(number) == 0:
                average(parts)
            return loss

        parts.train_step = local_step
    settle_buckets(parts.model, parts.train.images[:2])
    return parts


def average(parts: Parts) -> None:
    """Average the weights of both processes, in the memory format that they have, unless DDP keeps them equal."""
    if unwrap(parts.model) is parts.model:
        average_parameters(parts.model.parameters(), None)
        parts.model.to(memory_format=parts.runtime.memory_format)  # torch makes them contiguous


def train_to_accuracy(parts: Parts, target: float, every: int) -> dict[str, Any]:
    """Train until the test accuracy is `target`; return it by step.

    A test follows every `every` steps in the second half of the recipe. They are a multiple of those between two
    averages of the weights, so that averaging them for a test changes no training.
    """
    last = parts.plan.total_steps(parts.config)
    accuracies: dict[int, float] = {}
    while parts.state.step < last and not any(accuracy >= target for accuracy in accuracies.values()):
        parts.steps(min(every, last - parts.state.step))
        if parts.state.step > last / 2:
            average(parts)
            accuracies[parts.state.step] = evaluate(parts.model, parts.data.test, parts.runtime).accuracy
    return {"accuracies": accuracies}


def measure_steps(parts: Parts, length: int) -> dict[str, Any]:
    """Return the seconds and the bytes sent of a step, medians over rounds of `length` steps: 5 or more, for 4 s."""

    def train_round() -> tuple[float, float]:
        began, sent = time.perf_counter(), bytes_sent()
        parts.steps(length)
        return (time.perf_counter() - began) / length, (bytes_sent() - sent) / length

    train_round()  # the first steps allocate memory, and PowerSGD's first one is whole
    seconds, _ = train_round()
    count = parts.runtime.from_main(min(50, max(5, round(4 / (seconds * length)))))
    all_seconds, sent = zip(*(train_round() for _ in range(count)), strict=True)
    return {"seconds": median(all_seconds), "bytes": median(sent), "rounds": count}


def bytes_sent() -> int:
    """Return the bytes that this host has sent over the cable, with the headers of all layers."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()  # of this network namespace
    return next(int(line.split()[9]) for line in lines if line.lstrip().startswith("cable:"))


def main() -> None:
    """Train by each method: to an accuracy, tested every so many steps, or a few steps if it is 0."""
    methods, recipe, seed, target, every = sys.argv[1:]
    for method in methods.split(","):
        if float(target):
            parts = build(method, recipe, int(seed))
            found: dict[str, Any] = train_to_accuracy(parts, float(target), int(every))
        else:
            parts = build(method, recipe, int(seed), start_powerSGD_iter=2)
            found = measure_steps(parts, int(method.removeprefix("local-")) if method.startswith("local") else 4)
        parts.runtime.print0(json.dumps({"method": method} | found))
        parts.runtime.close()


if __name__ == "__main__":
    main()
