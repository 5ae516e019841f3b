"""The batch arithmetic: the division of a global batch among processes and into micro-batches."""

import math
from dataclasses import dataclass

from cifar.config import TrainConfig
from cifar.errors import UserError, count


@dataclass(frozen=True)
class BatchPlan:
    """The division of an optimizer step's images into shares of the processes, and of these into micro-batches."""

    world_size: int  # processes that train together
    local_batch_size: int  # the most images that one process runs at once
    global_batch_size: int  # images that one optimizer step sees
    steps_per_epoch: int  # optimizer steps in an epoch; the remaining images are dropped, different ones every epoch

    @classmethod
    def make(cls, config: TrainConfig, world_size: int, train_size: int) -> "BatchPlan":
        """Return the plan for `train_size` training images."""
        size = config.global_batch_size or config.local_batch_size * world_size
        if size < world_size:
            raise UserError(
                f"a global batch of {count(size, 'image')} cannot be divided among {world_size} processes: "
                f"start at most {size}, or raise --global-batch-size"
            )
        if size > train_size:
            raise UserError(
                f"a global batch of {size} images is more than the {train_size} training images: "
                f"lower --global-batch-size and --local-batch-size"
            )
        return cls(world_size, config.local_batch_size, size, train_size // size)

    @property
    def accumulation(self) -> int:
        """Return the micro-batches of the largest share."""
        return math.ceil(self.global_batch_size / (self.world_size * self.local_batch_size))

    def micro_batch_sizes(self, rank: int) -> list[int]:
        """Return the images in each micro-batch of a step of `rank`, largest first.

        Shares differ by one image at most, and so do the micro-batches of a share.
        """
        share = len(range(rank, self.global_batch_size, self.world_size))
        parts = min(self.accumulation, share)
        return [len(range(part, share, parts)) for part in range(parts)]

    def advise_on_memory(self) -> str:
        """Return the local batch that memory does not suffice for, and what to do."""
        local = self.micro_batch_sizes(rank=0)[0]
        remedy = "use a smaller model"
        if local > 1:
            flags = f"--local-batch-size {local // 2} --global-batch-size {self.global_batch_size}"
            remedy = f"use {flags}, which accumulates gradients over the same global batch"
        return f"a local batch of {local}: {remedy}, or end the other programs that use it"

    def base_learning_rate(self, config: TrainConfig) -> float:
        """Return the learning rate for this global batch, scaled linearly (Goyal et al. 2017, arXiv 1706.02677)."""
        if config.lr_scaling == "none":
            return config.lr
        return config.lr * self.global_batch_size / config.lr_batch_size

    def total_steps(self, config: TrainConfig) -> int:
        """Return the optimizer steps of the whole run, regardless of `--max-steps`."""
        return config.epochs * self.steps_per_epoch

    def last_step(self, config: TrainConfig) -> int:
        """Return the optimizer step at which the run ends."""
        return min(self.total_steps(config), config.max_steps or self.total_steps(config))
