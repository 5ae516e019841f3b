"""Named sets of defaults: what a run trains unless the command line says otherwise.

Every field of a recipe is also a flag, so a recipe is a starting point: `--recipe wide --epochs 3` works. To add one,
add an entry to `RECIPES`.
"""

import dataclasses
from typing import Any

from cifar.config import Recipe, TrainConfig

# After K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (arXiv 2404.00498), and the Muon variant of its
# code: the model, the alternating flip, the label smoothing, the test-time augmentation and the rates.
_SPEED94 = Recipe(
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
    precision="auto",
    log_steps=5,
)

RECIPES: dict[str, Recipe] = {
    # The classic four-step PyTorch tutorial, number for number.
    "tutorial": Recipe(),
    # The tutorial's closing exercise, a wider net, and what makes the width pay: batches that fill a device,
    # augmentation, weight decay, and a learning rate that warms up and falls to zero.
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
    # The tutorial's Net to 60 % as fast as possible: batches small enough for many steps and large enough for fast
    # ones, Muon, which learns more per step, and a rate that falls in a straight line.
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
        precision="auto",
        log_steps=50,
    ),
    "speed94": _SPEED94,
    # The same with a wider and deeper model, more epochs and stronger augmentation.
    "speed96": dataclasses.replace(
        _SPEED94,
        model="speed-wide",
        epochs=40,
        local_batch_size=1000,
        global_batch_size=1000,
        lr=670.0,
        crop_padding=4,
        cutout=12,
        log_steps=10,
    ),
}


def config_from_recipe(name: str, **changes: Any) -> TrainConfig:
    """Return the defaults of the recipe `name`, with `changes` applied."""
    recipe = RECIPES[name]
    lr_batch_size = recipe.global_batch_size or recipe.local_batch_size
    fields = dataclasses.asdict(recipe) | {"recipe": name, "lr_batch_size": lr_batch_size}
    return TrainConfig(**(fields | changes))
