"""What a person reads while it runs: the banner, the running loss in the tutorial's words, the accuracies."""

import math

from cifar.batch_plan import BatchPlan, count
from cifar.config import TrainConfig
from cifar.data import Data
from cifar.datasets import CLASSES
from cifar.evaluation import Evaluation
from cifar.loop import LogPoint, TrainState
from cifar.resume import Resumed
from cifar.optim import base_learning_rate
from cifar.distributed.runtime import Runtime

STAND_IN = "WARNING: these are the built-in stand-in images, not CIFAR-10: no accuracy here compares with CIFAR-10's"


class Console:
    """Rank zero's voice during a run; on the other ranks it says nothing."""

    def __init__(self, config: TrainConfig, runtime: Runtime, data: Data, plan: BatchPlan) -> None:
        self._config, self._runtime, self._data, self._plan = config, runtime, data, plan
        self._bar = None

    def banner(self, state: TrainState, run_dir: str, wandb: str, resumed: Resumed | None) -> None:
        """Say what will happen, before it does."""
        batches, rate = describe(self._config, self._plan)
        parameters = sum(parameter.numel() for parameter in state.net.parameters())
        where = f", from {self._config.data_dir}" if self._data.name == "cifar10" else ", the built-in stand-in"
        lines = {
            "processes": self._runtime.describe(),
            "dataset": f"{self._data.name}{where}: {len(self._data.train):,} training, {len(self._data.test):,} test",
            "net": f"{self._config.model}, {parameters:,} parameters, {self._config.precision}"
            + (", compiled" if self._config.compile else ""),
            "recipe": f"{self._config.recipe}, augmentation {self._config.augment}, seed {self._config.seed}",
            "batches": batches,
            "lr": rate,
            "run folder": run_dir,
            "W&B": wandb,
        }
        if resumed is not None:
            place = f"after step {state.step:,} of {self._plan.last_step(self._config):,}"
            lines["resumes"] = place if resumed.newest else "from the start, as no checkpoint had been written"
            if resumed.changes:
                lines["changed"] = ", ".join(resumed.changes)
        for name, text in lines.items():
            self._runtime.print0(f"{name:<11} {text}")
        if self._data.name == "synthetic":
            self._runtime.print0(STAND_IN)
        self._runtime.print0()

    def start_bar(self, state: TrainState) -> None:
        """Show images/s and the time left, where standard error is a terminal."""
        if self._runtime.is_main:
            from tqdm import tqdm

            size, last_step = self._plan.global_batch_size, self._plan.last_step(self._config)
            self._bar = tqdm(
                total=last_step * size, initial=state.step * size, unit=" images", unit_scale=True,
                dynamic_ncols=True, mininterval=0.5, disable=None, leave=False,
            )  # fmt: skip

    def on_step(self) -> None:
        """Move the bar by one optimizer step."""
        if self._bar is not None:
            self._bar.update(self._plan.global_batch_size)

    def on_log(self, point: LogPoint) -> None:
        """The running loss, as the tutorial prints it."""
        self._runtime.print0(f"[{point.epoch}, {point.batch:5d}] loss: {point.loss:.3f}")

    def on_test(self, epoch: int, test: Evaluation) -> None:
        """One line at an epoch's end."""
        self._runtime.print0(f"epoch {epoch}: test accuracy {100 * test.accuracy:.2f} %, loss {test.loss:.3f}")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def print_test(runtime: Runtime, data: Data, test: Evaluation, views: Evaluation | None = None) -> None:
    """The accuracies in the tutorial's words; whole percents are rounded down, as there.

    `views` is the evaluation with test-time augmentation, where there is one.
    """
    percent = math.floor(100 * test.accuracy)
    runtime.print0(f"Accuracy of the network on the {test.total} test images: {percent} %")
    runtime.print0(f"({test.correct:,} of {test.total:,} correct, loss {test.loss:.4f})")
    if views is not None:
        runtime.print0(f"with test-time augmentation: {100 * views.accuracy:.2f} %, without: {100 * test.accuracy:.2f} %")
    for name, accuracy in zip(CLASSES, test.class_accuracies(), strict=True):
        runtime.print0(f"Accuracy for class: {name:5s} is {100 * accuracy:.1f} %")
    if data.name == "synthetic":
        runtime.print0(STAND_IN)


def describe(config: TrainConfig, plan: BatchPlan) -> tuple[str, str]:
    """The arithmetic of the batches and of the learning rate, a line each."""
    batches = (
        f"{plan.local_batch_size} local x {count(plan.world_size, 'process', 'es')} x {plan.accumulation} accumulated "
        f"= {plan.global_batch_size} global; {plan.steps_per_epoch:,} steps an epoch, {count(config.epochs, 'epoch')}"
    )
    base = base_learning_rate(config, plan)
    if config.lr_scaling == "none":
        rate = f"{config.lr:g}, not scaled"
    elif plan.global_batch_size == config.lr_batch_size:
        rate = f"{base:g}, stated for this global batch"
    else:
        rate = f"{config.lr:g} x {plan.global_batch_size} / {config.lr_batch_size} = {base:g} (linear scaling)"
    warmup = f", warm-up over epochs 0 to {config.warmup_epochs:g}" if config.warmup_epochs else ""
    return batches, f"{rate}; {config.schedule}{warmup}"
