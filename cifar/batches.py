"""The arithmetic of batches and learning rates, done once at the start and printed in the banner."""

import math
from dataclasses import dataclass

from cifar.config import TrainConfig
from cifar.errors import UserError
from cifar.recipes import RECIPES


@dataclass(frozen=True)
class BatchPlan:
    """How the images of one optimizer step are spread over processes and micro-batches.

    Attributes:
        world_size: processes that train together.
        local_batch_size: images in a micro-batch, what one process runs at once.
        global_batch_size: images that one optimizer step sees.
        steps_per_epoch: optimizer steps in an epoch; the images left over are dropped (others every epoch).
    """

    world_size: int
    local_batch_size: int
    global_batch_size: int
    steps_per_epoch: int

    @property
    def accumulation(self) -> int:
        """Micro-batches whose gradients each process adds up before an update."""
        return self.global_batch_size // (self.local_batch_size * self.world_size)

    @classmethod
    def make(cls, config: TrainConfig, world_size: int, train_size: int) -> "BatchPlan":
        """The plan for `train_size` training images.

        A resumed run keeps its global batch on any number of processes, and so does a recipe that states one (but for
        what doesn't divide): where the local batch doesn't fit, the largest smaller one that does is taken.

        Raises:
            UserError: the sizes don't divide, or a batch is larger than the training set.
        """
        local = config.local_batch_size
        size = config.global_batch_size or local * world_size
        own = RECIPES[config.recipe].global_batch_size
        if own is not None and config.global_batch_size == own:
            size -= size % world_size  # a recipe that states its global batch runs on any number of processes
        if config.resume is not None or own is not None:
            local = next((n for n in range(local, 0, -1) if size % (n * world_size) == 0), local)
        unit = local * world_size
        if size % unit:
            below, above = size // unit * unit, (size // unit + 1) * unit
            nearest = f"{below} or {above}" if below else f"{above}"
            raise UserError(
                f"--global-batch-size {size} is not a multiple of local batch {local} x "
                f"{count(world_size, 'process', 'es')} = {unit}: the nearest that fit are {nearest}"
                if below
                else f"--global-batch-size {size} is less than local batch {local} x "
                f"{count(world_size, 'process', 'es')} = {unit}: the nearest that fits is {nearest}, "
                f"or lower --local-batch-size"
            )
        if size > train_size:
            raise UserError(f"a global batch of {size} images is more than the {train_size} training images")
        return cls(world_size, local, size, train_size // size)

    def total_steps(self, config: TrainConfig) -> int:
        """Optimizer steps of the whole run, `--max-steps` left aside."""
        return config.epochs * self.steps_per_epoch

    def last_step(self, config: TrainConfig) -> int:
        """The optimizer step at which the run ends."""
        return min(self.total_steps(config), config.max_steps or self.total_steps(config))


def base_learning_rate(config: TrainConfig, plan: BatchPlan) -> float:
    """The learning rate for this global batch: linear scaling after Goyal et al. 2017 (arXiv 1706.02677)."""
    if config.lr_scaling == "none":
        return config.lr
    return config.lr * plan.global_batch_size / config.lr_batch_size


def learning_rate(config: TrainConfig, plan: BatchPlan, step: int) -> float:
    """The learning rate of optimizer step `step` (from 0): a function of the step, with no state to save.

    "cosine" is Loshchilov & Hutter 2017 (arXiv 1608.03983) without restarts, "linear" a straight line to zero; the
    warm-up is that of Goyal et al., which large batches need for their scaled rates.
    """
    lr = base_learning_rate(config, plan)
    if config.warmup_epochs:
        lr *= min(1.0, (step + 1) / (config.warmup_epochs * plan.steps_per_epoch))
    if config.schedule == "cosine":
        lr *= (1 + math.cos(math.pi * step / plan.total_steps(config))) / 2
    elif config.schedule == "linear":
        lr *= 1 - step / plan.total_steps(config)
    return lr


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


def count(number: int, noun: str, plural: str = "s") -> str:
    """ "1 epoch", "2 epochs"."""
    return f"{number} {noun}" + (plural if number != 1 else "")
