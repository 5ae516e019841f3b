"""Train by each method in one of two processes, which `slow_link` starts; rank zero prints a line of JSON for each.

A method is a communication hook, such as powersgd-RANK, or local-STEPS: local SGD (Stich 2019, arXiv 1805.09767), in
which each process updates its own weights by its own images, and averages the weights every STEPS steps, the momentum
never.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.algorithms.model_averaging.utils import average_parameters

from cifar.cli import launch
from cifar.config import TrainConfig
from cifar.data import Data, load_data
from cifar.distributed.ddp import ddp_options, settle_buckets
from cifar.distributed.runtime import Runtime
from cifar.evaluation import evaluate
from cifar.models import build_model
from cifar.optim import build_optimizer, learning_rate, set_learning_rate
from train_ddp import train_step


class Training:
    """A model in training, put together as in train_ddp.py."""

    def __init__(self, method: str, config: TrainConfig, runtime: Runtime, data: Data, **options: int) -> None:
        kind, _, number = method.partition("-")
        self.config, self.runtime, self.data, self._averager = config, runtime, data, None
        torch.manual_seed(config.seed)
        self.model = build_model(config.model, len(data.classes))
        if kind == "local":
            self.model.to(memory_format=runtime.memory_format)
            self._averager = PeriodicModelAverager(int(number), warmup_steps=int(number) - 1)
        else:
            runtime.accelerator.ddp_handler = handler = ddp_options(kind)
            if number:
                handler.comm_state_option |= {"matrix_approximation_rank": int(number)} | options
            self.model = runtime.prepare(self.model)
            settle_buckets(self.model, data.train.dataset.images[:2])
        self._optimizer = build_optimizer(self.model, config)

    def steps(self) -> Iterator[int]:
        """Train for the recipe's epochs; yield the number of steps after each of them."""
        step, plan = 0, self.data.plan
        for epoch in range(self.config.epochs):
            self.data.train.set_epoch(epoch)
            for batches in self.data.train:
                set_learning_rate(self._optimizer, learning_rate(self.config, plan, step))
                size, smoothing = plan.global_batch_size, self.config.label_smoothing
                with self.runtime.convolutions():
                    train_step(self.model, batches, size, self._optimizer, self.runtime, smoothing)
                if self._averager is not None:
                    self._averager.average_parameters(self.model.parameters())
                step += 1
                yield step

    def test(self) -> float:
        """Return the test accuracy, 0 to 1, of the average weights."""
        if self._averager is not None:
            average_parameters(self.model.parameters(), self._averager.process_group)
        return evaluate(self.model, self.data.test, self.runtime).accuracy


def train_to_accuracy(training: Training, target: float, every: int) -> dict[str, Any]:
    """Test every `every` steps, in the second half of the recipe, until `target` is reached.

    `every` is a multiple of the steps between two averages, so that a test changes no weights.

    Returns:
        {"accuracies": {step: accuracy}, "seconds": those of the steps, without the tests}
    """
    last, seconds = training.data.plan.total_steps(training.config), 0.0
    accuracies: dict[int, float] = {}
    began = time.perf_counter()
    for step in training.steps():
        if (step % every == 0 and step > last / 2) or step == last:
            seconds += time.perf_counter() - began
            accuracies[step] = training.test()
            if accuracies[step] >= target:
                break
            began = time.perf_counter()
    return {"accuracies": accuracies, "seconds": seconds}


def measure_steps(training: Training, round_length: int) -> dict[str, list[float]]:
    """Return the seconds and the bytes sent of a step, in each round of about 4 s together; at least 5 rounds."""
    steps = training.steps()

    def train_round() -> tuple[float, float]:
        began, sent = time.perf_counter(), bytes_sent()
        for _ in range(round_length):
            next(steps)
        return (time.perf_counter() - began) / round_length, (bytes_sent() - sent) / round_length

    train_round()  # the first steps allocate memory, and PowerSGD's first one is whole
    seconds, _ = train_round()
    count = training.runtime.from_main(min(50, max(5, round(4 / (seconds * round_length)))))
    rounds = [train_round() for _ in range(count)]
    return {"seconds": [seconds for seconds, _ in rounds], "bytes": [sent for _, sent in rounds]}


def bytes_sent() -> int:
    """Return the bytes that this host has sent over the cable, with the headers of all layers."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()  # of this network namespace
    cable = next(line for line in lines if line.lstrip().startswith("cable:"))
    return int(cable.split()[9])


def main() -> None:
    """Train by each method: to an accuracy, tested every so many steps, or a few steps if it is 0."""
    methods, target, every, *flags = sys.argv[1:]
    with launch(flags) as (config, runtime):
        data = load_data(config, runtime)
        for method in methods.split(","):
            if float(target):
                found = train_to_accuracy(Training(method, config, runtime, data), float(target), int(every))
            else:
                length = int(method.removeprefix("local-")) if method.startswith("local") else 4
                found = measure_steps(Training(method, config, runtime, data, start_powerSGD_iter=2), length)
            runtime.print0(json.dumps({"method": method} | found))


if __name__ == "__main__":
    main()
