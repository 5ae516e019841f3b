"""The arithmetic of batches and learning rates, done once at the start and printed in the banner."""

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


def count(number: int, noun: str, plural: str = "s") -> str:
    """ "1 epoch", "2 epochs"."""
    return f"{number} {noun}" + (plural if number != 1 else "")
