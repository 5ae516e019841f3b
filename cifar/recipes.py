"""Named sets of defaults: what a run trains when the command line says nothing else.

Every field of a recipe is also a flag, so a recipe is a starting point: `--recipe wide --epochs 3` works.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The hyperparameters of a training run. `lr` belongs to a global batch of `local_batch_size` images."""

    model: str = "net"
    """The net to train: net or net-wide."""
    epochs: int = 4
    """Passes over the 50,000 training images."""
    local_batch_size: int = 4
    """Images that one process runs at once."""
    lr: float = 0.001
    """Learning rate for the recipe's own global batch; see --lr-scaling."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov's momentum instead of the heavy ball."""
    weight_decay: float = 0.0
    """Weight decay of SGD."""
    schedule: Literal["constant", "cosine"] = "constant"
    """How the learning rate moves over the run: not at all, or to zero along half a cosine."""
    warmup_epochs: float = 0.0
    """Epochs over which the learning rate grows from nothing to what it should be."""
    augment: Literal["none", "crop-flip"] = "none"
    """Augmentation: none, or a random crop with padding 4 and a random horizontal flip."""
    log_steps: int = 2000
    """Optimizer steps between two lines of running loss."""


RECIPES: dict[str, Recipe] = {
    # The classic four-step PyTorch tutorial, number for number.
    "tutorial": Recipe(),
    # The tutorial's closing exercise, a wider net, with what it needs to be worth its width: batches that
    # fill a device, augmentation, weight decay, and a learning rate that begins low, so that it may be high in
    # the middle, and ends at zero.
    "wide": Recipe(
        model="net-wide",
        epochs=10,
        local_batch_size=128,
        lr=0.05,
        nesterov=True,
        weight_decay=5e-4,
        schedule="cosine",
        warmup_epochs=1.0,
        augment="crop-flip",
        log_steps=100,
    ),
}
