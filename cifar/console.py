"""Console output: the banner, the running loss in the tutorial's words, the accuracies."""

import math

from cifar.batch_plan import BatchPlan, count
from cifar.config import TrainConfig
from cifar.data import Data
from cifar.distributed.runtime import Runtime
from cifar.evaluation import MANY_CLASSES, Evaluation
from cifar.optim import base_learning_rate
from cifar.resume import Resumed
from cifar.train_state import LogPoint, TrainState

# Parameters x images below which an H100 computes faster than the host launches kernels. `wide` has 1.2e8.
_LAUNCH_BOUND = 1e8
_MANY_TIMES = 8  # linear scaling holds to a point, which depends on the model (Goyal et al. 2017)
SYNTHETIC_WARNING = "WARNING: the synthetic dataset is not CIFAR-10: its accuracies do not compare with CIFAR-10's"


class Console:
    """The console output of a run, on rank zero; the other ranks print nothing."""

    def __init__(self, config: TrainConfig, runtime: Runtime, data: Data) -> None:
        self._config, self._runtime, self._data, self._plan = config, runtime, data, data.plan
        self._bar = None

    def banner(self, state: TrainState, run_dir: str, wandb: str, resumed: Resumed | None) -> None:
        """Print what is about to run."""
        batches, rate = describe(self._config, self._plan)
        parameters = sum(parameter.numel() for parameter in state.model.parameters())
        data, config = self._data, self._config
        where = "" if data.name == "synthetic" else f", from {config.data_dir}"
        sizes = f"{len(data.train.dataset):,} training, {len(data.test.dataset):,} test"
        per_process = parameters * self._plan.micro_batch_sizes(rank=0)[0]
        if self._runtime.world_size > 1 and self._runtime.device.type == "cuda" and per_process < _LAUNCH_BOUND:
            batches += "; a step waits for the host, so larger batches, as of --recipe resnet18, are for several GPUs"
        lines = {
            "processes": self._runtime.describe(),
            "dataset": f"{data.name}{where}: {sizes}, {len(data.classes)} classes"
            + (f"; {data.note}" if data.note else ""),
            "model": f"{config.model}, {parameters:,} parameters, {self._runtime.describe_precision()}"
            + (", compiled" if config.compile else ""),
            "recipe": f"{config.recipe}, augmentation {config.augment}, seed {config.seed}",
            "batches": batches,
            "lr": rate,
            "run": run_dir,
            "W&B": wandb,
        }
        if resumed is not None:
            place = f"after step {state.step:,} of {self._plan.last_step(config):,}"
            lines["resumes"] = place if resumed.checkpoint else "from the start: no checkpoint had been written"
            if resumed.changes:
                lines["changed"] = ", ".join(resumed.changes)
        for name, text in lines.items():
            self._runtime.print0(f"{name:<9} {text}")
        if (times := base_learning_rate(config, self._plan) / config.lr) >= _MANY_TIMES:
            self._runtime.print0(
                f"WARNING: lr is {times:g} times the recipe's. At 8 times, wide stopped learning in its second epoch: "
                f"watch the loss, or use a lower --lr or --global-batch-size"
            )
        if self._data.name == "synthetic":
            self._runtime.print0(SYNTHETIC_WARNING)
        self._runtime.print0()

    def start_bar(self, state: TrainState) -> None:
        """Show images/s and the remaining time, if stderr is a terminal."""
        if self._runtime.is_main:
            from tqdm import tqdm

            size, last_step = self._plan.global_batch_size, self._plan.last_step(self._config)
            self._bar = tqdm(
                total=last_step * size, initial=state.step * size, unit=" images", unit_scale=True,
                dynamic_ncols=True, mininterval=0.5, disable=None, leave=False,
            )  # fmt: skip

    def after_step(self) -> None:
        """Advance the progress bar by one optimizer step."""
        if self._bar is not None:
            self._bar.update(self._plan.global_batch_size)

    def log(self, point: LogPoint) -> None:
        """Print the running loss as the tutorial does."""
        self._runtime.print0(f"[{point.epoch}, {point.epoch_step:5d}] loss: {point.loss:.3f}")

    def log_test(self, step: int, test: Evaluation) -> None:
        """Print the test accuracy after an epoch, or after the last step of the run."""
        epoch, steps = divmod(step, self._plan.steps_per_epoch)
        when = f"epoch {epoch}" if steps == 0 else f"step {steps:,} of epoch {epoch + 1}"
        self._runtime.print0(f"{when}: test accuracy {100 * test.accuracy:.2f} %, loss {test.loss:.3f}")

    def finish(self, state: TrainState) -> None:
        """Print that training has ended, as the tutorial does, and the seconds that it took."""
        self.close()
        total, first = state.train_seconds, state.first_step_seconds
        self._runtime.print0("Finished Training")
        self._runtime.print0(
            f"({total:,.2f} s of training: {first:,.2f} s for the first step, {total - first:,.2f} s for the rest)"
        )

    def close(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            self._bar.close()


def print_test(runtime: Runtime, dataset: str, test: Evaluation, tta_test: Evaluation | None = None) -> None:
    """Print the accuracies in the tutorial's words; whole percents are rounded down, as there.

    Args:
        dataset: its name.
        tta_test: the evaluation with test-time augmentation, if there is one.
    """
    percent = math.floor(100 * test.accuracy)
    runtime.print0(f"Accuracy of the network on the {test.total} test images: {percent} %")
    runtime.print0(f"({test.correct:,} of {test.total:,} correct, loss {test.loss:.4f})")
    if tta_test is not None:
        runtime.print0(
            f"with test-time augmentation: {100 * tta_test.accuracy:.2f} %, without: {100 * test.accuracy:.2f} %"
        )
    accuracies = test.class_accuracies()
    lowest: dict[str, float] = {}
    if len(accuracies) > MANY_CLASSES:
        half = MANY_CLASSES // 2
        lowest, highest = test.lowest_and_highest(half)
        accuracies = lowest | highest
        runtime.print0(f"The {half} lowest and the {half} highest accuracies of {len(test.classes)} classes:")
    width = max(map(len, accuracies))
    for number, (name, accuracy) in enumerate(accuracies.items()):
        if lowest and number == len(lowest):
            runtime.print0("...")
        runtime.print0(f"Accuracy for class: {name:{width}s} is {100 * accuracy:.1f} %")
    if dataset == "synthetic":
        runtime.print0(SYNTHETIC_WARNING)


def describe(config: TrainConfig, plan: BatchPlan) -> tuple[str, str]:
    """Return the arithmetic of the batches and of the learning rate, a line each."""
    size, processes = plan.global_batch_size, count(plan.world_size, "process", "es")
    largest = plan.micro_batch_sizes(rank=0)[0]
    # Where the global batch does not divide evenly, some micro-batches have an image less.
    missing = largest * plan.world_size * plan.accumulation - size
    batches = (
        f"{largest} local x {processes} x {plan.accumulation} accumulated{f' - {missing}' if missing else ''} "
        f"= {size} global; {plan.steps_per_epoch:,} steps an epoch, {count(config.epochs, 'epoch')}"
    )
    base = base_learning_rate(config, plan)
    if config.lr_scaling == "none":
        rate = f"{config.lr:g}, stated for {config.lr_batch_size:,} images, not scaled"
    elif plan.global_batch_size == config.lr_batch_size:
        rate = f"{base:g}, stated for this global batch"
    else:
        rate = f"{config.lr:g} x {plan.global_batch_size} / {config.lr_batch_size} = {base:g} (linear scaling)"
    optimizer = {"sgd": "SGD", "muon": f"SGD, and Muon at {config.muon_lr:g} for the filters"}[config.optimizer]
    warmup = f", warm-up over epochs 0 to {config.warmup_epochs:g}" if config.warmup_epochs else ""
    return batches, f"{rate}; {config.schedule}{warmup}; {optimizer}"
