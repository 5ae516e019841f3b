"""Checkpoints to write and to corrupt, and a dataset small enough to train on in a test."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cifar.checkpoint import FORMAT, DamagedCheckpointError, TrainState, load_checkpoint, save_checkpoint
from cifar.datasets.cifar10 import CLASSES
from cifar.models import build_model
from cifar.optim import build_optimizer
from cifar.recipes import config_from_recipe
from tests.helpers.comparing import same


def content(step: int = 1, recipe: str = "tutorial") -> dict[str, Any]:
    """Return a checkpoint of a `net` and its optimizer after one update; others at every `step`."""
    torch.manual_seed(step)
    config = config_from_recipe(recipe)
    model = build_model("net", 10)
    optimizer = build_optimizer(model, config)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    state = TrainState(model, optimizer, torch.amp.GradScaler("cpu"), step=step, best_step=step)
    return {
        "format": FORMAT,
        "config": config.to_json() | {"model": "net"},
        "dataset": "synthetic",
        "classes": list(CLASSES),
        "image_size": 32,
        "state": state.state_dict([state.rank_state(rank=0)]),
    }


def save_weights(
    path: Path, model: nn.Module, name: str = "net", dataset: str = "cifar10", classes: Iterable[str] = CLASSES
) -> str:
    """Write a checkpoint of `model`, without an optimizer, and return its path."""
    content = {"format": FORMAT, "config": {"model": name}, "dataset": dataset, "classes": list(classes)}
    save_checkpoint(path, content | {"state": {"model": model.state_dict()}})
    return str(path)


def small() -> dict[str, Any]:
    """Return a checkpoint of few bytes."""
    return {
        "format": FORMAT,
        "config": {},
        "dataset": "",
        "classes": ["a"],
        "image_size": 32,
        "state": {"x": torch.arange(1, 9)},
    }


def flip_bit(path: Path, at: float = 0.5) -> None:
    """Flip a bit of a file, at the fraction `at` of its length."""
    with path.open("r+b") as file:
        place = int(at * (os.fstat(file.fileno()).st_size - 1))
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def flip_bits(path: Path, bits: Iterable[int]) -> tuple[int, list[int]]:
    """Flip bits of a checkpoint, one at a time; return how many were detected, and those that changed its content."""
    raw, original = path.read_bytes(), load_checkpoint(path)
    detected, changed = 0, []
    for bit in bits:
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            if not same(load_checkpoint(path), original):
                changed.append(bit)
        except DamagedCheckpointError:
            detected += 1
    path.write_bytes(raw)
    return detected, changed
