"""Console output: the banner, the running loss in the tutorial's words, the accuracies."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from cifar.batch_plan import BatchPlan
from cifar.config import TrainConfig
from cifar.errors import count
from cifar.evaluation import MANY_CLASSES, Evaluation
from cifar.records.metrics import LogPoint

# Parameters x images below which an H100 computes faster than the host launches kernels. `wide` has 1.2e8.
_LAUNCH_BOUND = 1e8
_MANY_TIMES = 8  # linear scaling holds to a point, which depends on the model (Goyal et al. 2017)
SYNTHETIC_WARNING = "WARNING: the synthetic dataset is not CIFAR-10: its accuracies do not compare with CIFAR-10's"

PrintLine = Callable[[str], None]
"""A function that prints a line on rank zero, and nothing on the others."""


class Console:
    """The console output of a run, on rank zero; the other ranks print nothing."""

    def __init__(self, config: TrainConfig, plan: BatchPlan, print_line: PrintLine, is_main: bool) -> None:
        self._config, self._plan, self._print, self._is_main = config, plan, print_line, is_main
        self._bar = None

    def banner(
        self, device: torch.device, hosts: int, dataset: str, is_synthetic: bool, parameters: int, run_dir: Path,
        wandb: str, resumed: dict[str, str],
    ) -> None:  # fmt: skip
        """Print what is about to run; `resumed` are lines about how the run continues, by their names."""
        config, plan = self._config, self._plan
        batches = describe_batches(config, plan)
        per_process = parameters * plan.micro_batch_sizes(rank=0)[0]
        if plan.world_size > 1 and device.type == "cuda" and per_process < _LAUNCH_BOUND:
            batches += "; a step waits for the host, so larger batches, as of --recipe resnet18, are for several GPUs"
        compiled = ", compiled" if config.compile else ""
        lines = {
            "processes": describe_processes(plan.world_size, hosts, device),
            "dataset": dataset,
            "model": f"{config.model}, {parameters:,} parameters, {config.precision}{compiled}",
            "recipe": f"{config.recipe}, augmentation {config.augment}, seed {config.seed}",
            "batches": batches,
            "lr": describe_rate(config, plan),
            "run": run_dir,
            "W&B": wandb,
        }
        for name, text in (lines | resumed).items():
            self._print(f"{name:<9} {text}")
        if (times := plan.base_learning_rate(config) / config.lr) >= _MANY_TIMES:
            self._print(
                f"WARNING: lr is {times:g} times the recipe's. At 8 times, wide stopped learning in its second epoch: "
                f"watch the loss, or use a lower --lr or --global-batch-size"
            )
        if is_synthetic:
            self._print(SYNTHETIC_WARNING)
        self._print("")

    def start_bar(self, step: int) -> None:
        """Show images/s and the remaining time, if stderr is a terminal."""
        if self._is_main:
            from tqdm import tqdm

            size, last_step = self._plan.global_batch_size, self._plan.last_step(self._config)
            self._bar = tqdm(
                total=last_step * size, initial=step * size, unit=" images", unit_scale=True,
                dynamic_ncols=True, mininterval=0.5, disable=None, leave=False,
            )  # fmt: skip

    def after_step(self) -> None:
        """Advance the progress bar by one optimizer step."""
        if self._bar is not None:
            self._bar.update(self._plan.global_batch_size)

    def log(self, point: LogPoint) -> None:
        """Print the running loss, as the tutorial does."""
        self._print(f"[{point.epoch}, {point.epoch_step:5d}] loss: {point.loss:.3f}")

    def log_test(self, step: int, test: Evaluation) -> None:
        """Print the test accuracy after an epoch, or after the last step of the run."""
        epoch, steps = divmod(step, self._plan.steps_per_epoch)
        when = f"epoch {epoch}" if steps == 0 else f"step {steps:,} of epoch {epoch + 1}"
        self._print(f"{when}: test accuracy {100 * test.accuracy:.2f} %, loss {test.loss:.3f}")

    def finish(self, seconds: float, first_step_seconds: float) -> None:
        """Print that training has ended, as the tutorial does, and the seconds that it took."""
        self.close()
        self._print("Finished Training")
        parts = f"{first_step_seconds:,.2f} s for the first step, {seconds - first_step_seconds:,.2f} s for the rest"
        self._print(f"({seconds:,.2f} s of training: {parts})")

    def close(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            self._bar.close()


def print_test(print_line: PrintLine, dataset: str, test: Evaluation, tta_test: Evaluation | None = None) -> None:
    """Print the accuracies in the tutorial's words; whole percents are rounded down, as there.

    `dataset` is its name, and `tta_test` the evaluation with test-time augmentation, if there is one.
    """
    print_line(f"Accuracy of the network on the {test.total} test images: {math.floor(100 * test.accuracy)} %")
    print_line(f"({test.correct:,} of {test.total:,} correct, loss {test.loss:.4f})")
    if tta_test is not None:
        without = f"without: {100 * test.accuracy:.2f} %"
        print_line(f"with test-time augmentation: {100 * tta_test.accuracy:.2f} %, {without}")
    accuracies = test.class_accuracies()
    if len(accuracies) > MANY_CLASSES:
        half = MANY_CLASSES // 2
        accuracies = test.lowest_and_highest(half)
        print_line(f"The {half} lowest and the {half} highest accuracies of {len(test.classes)} classes:")
    width = max(map(len, accuracies))
    for name, value in accuracies.items():
        print_line(f"Accuracy for class: {name:{width}s} is {100 * value:.1f} %")
    if dataset == "synthetic":
        print_line(SYNTHETIC_WARNING)


def describe_processes(world_size: int, hosts: int, device: torch.device) -> str:
    """Return processes and devices in one phrase."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else device.type.upper()
    threads = "" if on_gpu else f", {count(torch.get_num_threads(), 'thread')}"
    if world_size == 1:
        gpus = torch.cuda.device_count() if on_gpu else 1
        others = f", 1 of {gpus} GPUs (torchrun --nproc_per_node=gpu uses all)" if gpus > 1 else ""
        return f"1 process on {name}{threads}{others}"
    each = f"{threads} each" if threads else ""
    on_hosts = f", on {hosts} hosts" if hosts > 1 else ""
    return f"{world_size} processes on {name} ({dist.get_backend()}){each}{on_hosts}"


def describe_batches(config: TrainConfig, plan: BatchPlan) -> str:
    """Return the arithmetic of the batches."""
    size, processes, parts = plan.global_batch_size, count(plan.world_size, "process", "es"), plan.accumulation
    largest = plan.micro_batch_sizes(rank=0)[0]
    share, extra = divmod(size, plan.world_size)
    shares = f"{share} or {share + 1}" if extra else f"{share}"
    in_parts = f", in {parts} micro-batches of at most {largest}" if parts > 1 else ""
    batch = f"{size} global among {processes}: {shares} each{in_parts}"
    if largest * plan.world_size * parts == size:
        batch = f"{largest} local x {processes} x {parts} accumulated = {size} global"
    return f"{batch}; {count(plan.steps_per_epoch, 'step')} an epoch, {count(config.epochs, 'epoch')}"


def describe_rate(config: TrainConfig, plan: BatchPlan) -> str:
    """Return the arithmetic of the learning rate."""
    base = plan.base_learning_rate(config)
    if config.lr_scaling == "none":
        rate = f"{config.lr:g}, stated for {config.lr_batch_size:,} images, not scaled"
    elif plan.global_batch_size == config.lr_batch_size:
        rate = f"{base:g}, stated for this global batch"
    else:
        rate = f"{config.lr:g} x {plan.global_batch_size} / {config.lr_batch_size} = {base:g} (linear scaling)"
    optimizer = {"sgd": "SGD", "muon": f"SGD, and Muon at {config.muon_lr:g} for the filters"}[config.optimizer]
    warmup = f", warm-up over epochs 0 to {config.warmup_epochs:g}" if config.warmup_epochs else ""
    return f"{rate}; {config.schedule}{warmup}; {optimizer}"
