"""Named sets of defaults: what a run trains when the command line says nothing else.

Every field of a recipe is also a flag, so a recipe is a starting point: `--recipe wide --epochs 3` works.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The hyperparameters of a training run. `lr` belongs to a global batch of `local_batch_size` images."""

    model: str = "net"
    """The net to train: net, net-wide, resnet18, speed or speed-wide."""
    epochs: int = 4
    """Passes over the 50,000 training images."""
    local_batch_size: int = 4
    """Images that one process runs at once."""
    global_batch_size: int | None = None
    """Images that one optimizer step sees (default: local batch x world size); more accumulates gradients."""
    lr: float = 0.001
    """Learning rate for the recipe's own global batch; see --lr-scaling."""
    lr_scaling: Literal["linear", "none"] = "linear"
    """linear: lr x global batch / the recipe's own global batch (Goyal et al. 2017)."""
    optimizer: Literal["sgd", "muon"] = "sgd"
    """sgd, or muon: Muon for the filters of the convolutions, SGD for all else."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov's momentum instead of the heavy ball."""
    weight_decay: float = 0.0
    """Weight decay of SGD."""
    bias_lr_scale: float = 1.0
    """Learning rate of the biases, as a multiple of lr."""
    muon_lr: float = 0.24
    """Learning rate of Muon, which follows the same schedule as lr."""
    muon_momentum: float = 0.6
    """Nesterov's momentum in Muon."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the learning rate moves over the run: not at all, or to zero along half a cosine or a straight line."""
    warmup_epochs: float = 0.0
    """Epochs over which the learning rate grows from nothing to what it should be."""
    label_smoothing: float = 0.0
    """Share of the target probability that is spread evenly over all classes."""
    augment: Literal["none", "crop-flip", "crop-altflip"] = "none"
    """none; a random crop and a random horizontal flip; or a crop and a flip in every other epoch."""
    crop_padding: int = 4
    """Pixels by which a random crop may move an image."""
    cutout: int = 0
    """Side of a square of every training image that is blanked out, 0 for none (DeVries & Taylor 2017)."""
    tta: Literal["none", "flip", "crop"] = "none"
    """Test-time augmentation after the run: the mean over mirror images, and over images moved by a pixel."""
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
    # The tutorial's Net to 60 % as soon as can be: batches that are small enough for many steps and large enough for
    # fast ones, Muon, which learns more from each, and a rate that falls in a straight line.
    "net-fast": Recipe(
        epochs=2,
        local_batch_size=64,
        global_batch_size=64,
        lr=0.04,
        lr_scaling="none",
        optimizer="muon",
        muon_lr=0.1,
        nesterov=True,
        schedule="linear",
        warmup_epochs=0.25,
        log_steps=100,
    ),
    # The usual ResNet-18 for 32 x 32 images, trained in the usual way.
    "resnet18": Recipe(
        model="resnet18",
        epochs=60,
        local_batch_size=256,
        lr=0.2,
        nesterov=True,
        weight_decay=5e-4,
        schedule="cosine",
        warmup_epochs=2.0,
        augment="crop-flip",
        log_steps=50,
    ),
    # After K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (arXiv 2404.00498), and the Muon variant of its
    # code: the net, the alternating flip, the label smoothing, the test-time augmentation and the rates.
    "speed94": Recipe(
        model="speed",
        epochs=10,
        local_batch_size=2000,
        global_batch_size=2000,
        lr=1340.0,  # 0.67 for a loss that is the sum over 2,000 images
        lr_scaling="none",
        optimizer="muon",
        momentum=0.85,
        nesterov=True,
        weight_decay=3e-6,
        bias_lr_scale=0.08,
        schedule="linear",
        label_smoothing=0.2,
        augment="crop-altflip",
        crop_padding=2,
        tta="crop",
        log_steps=5,
    ),
    # The same with a wider and deeper net, more epochs and stronger augmentation.
    "speed96": Recipe(
        model="speed-wide",
        epochs=40,
        local_batch_size=1000,
        global_batch_size=1000,
        lr=670.0,
        lr_scaling="none",
        optimizer="muon",
        momentum=0.85,
        nesterov=True,
        weight_decay=3e-6,
        bias_lr_scale=0.08,
        schedule="linear",
        label_smoothing=0.2,
        augment="crop-altflip",
        crop_padding=4,
        cutout=12,
        tta="crop",
        log_steps=10,
    ),
}
