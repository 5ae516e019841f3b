"""The batch arithmetic: local batch x world size x accumulation = global batch."""

from dataclasses import dataclass

from cifar.config import TrainConfig
from cifar.errors import UserError
from cifar.recipes import RECIPES


@dataclass(frozen=True)
class BatchPlan:
    """The division of an optimizer step's images into processes and micro-batches.

    Attributes:
        world_size: processes that train together.
        local_batch_size: images in a micro-batch, which one process runs at once.
        global_batch_size: images that one optimizer step sees.
        steps_per_epoch: optimizer steps in an epoch; the remaining images are dropped (different ones every epoch).
    """

    world_size: int
    local_batch_size: int
    global_batch_size: int
    steps_per_epoch: int

    @property
    def accumulation(self) -> int:
        """Return the micro-batches per process and optimizer step."""
        return self.global_batch_size // (self.local_batch_size * self.world_size)

    @classmethod
    def make(cls, config: TrainConfig, world_size: int, train_size: int) -> "BatchPlan":
        """Return the plan for `train_size` training images.

        A resumed run and a recipe that states a global batch keep it at any world size (a recipe's is rounded down to a
        multiple of the world size): if the local batch does not divide it, the next smaller one that does is used.

        Raises:
            UserError: the sizes do not divide, or the global batch is larger than the training set.
        """
        local = config.local_batch_size
        size = config.global_batch_size or local * world_size
        own = RECIPES[config.recipe].global_batch_size
        if own is not None and config.global_batch_size == own:
            size -= size % world_size
        if config.resume is not None or own is not None:
            local = next((n for n in range(local, 0, -1) if size % (n * world_size) == 0), local)
        if config.resume is not None and size % world_size:
            fits = [n for n in range(1, size + 1) if size % n == 0]
            near = [max(n for n in fits if n < world_size), *[n for n in fits if n > world_size][:1]]
            raise UserError(
                f"--resume {config.resume}: that run's global batch of {count(size, 'image')} cannot be divided among "
                f"{world_size} processes: continue it on {' or '.join(map(str, near))}"
            )
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
            raise UserError(
                f"a global batch of {size} images is more than the {train_size} training images: "
                f"lower --global-batch-size and --local-batch-size"
            )
        return cls(world_size, local, size, train_size // size)

    def smaller_local_batch(self) -> int | None:
        """Return the largest local batch of at most half the size with the same global batch; None if there is none."""
        share, half = self.global_batch_size // self.world_size, self.local_batch_size // 2
        return next((size for size in range(half, 0, -1) if share % size == 0), None)

    def total_steps(self, config: TrainConfig) -> int:
        """Return the optimizer steps of the whole run, regardless of `--max-steps`."""
        return config.epochs * self.steps_per_epoch

    def last_step(self, config: TrainConfig) -> int:
        """Return the optimizer step at which the run ends."""
        return min(self.total_steps(config), config.max_steps or self.total_steps(config))


def count(number: int, noun: str, plural: str = "s") -> str:
    """Return the number with its noun: "1 epoch", "2 epochs"."""
    return f"{number} {noun}" + (plural if number != 1 else "")
