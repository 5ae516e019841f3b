"""Classify picture files: python -m cifar.predict CHECKPOINT IMAGE [IMAGE ...]"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from cifar.checkpoint import read_model
from cifar.cli import exit_on_error, parse_flags
from cifar.console import SYNTHETIC_WARNING
from cifar.data import normalize
from cifar.errors import UserError
from cifar.pictures import read_image


@dataclass(frozen=True)
class Prediction:
    """Name the three most probable classes of each picture."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A checkpoint of train_ddp.py, runs/NAME/checkpoints/step-NNNNNNNN.pt."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Pictures (PNG, JPEG, WebP, ...: see cifar/README.md); the middle square is scaled to 32 x 32."""


@torch.no_grad()
def predict(model: torch.nn.Module, images: Tensor) -> Tensor:
    """Return class probabilities, float32 [n, classes], of `images`, uint8 [n, 3, 32, 32]."""
    model.eval()
    return model(normalize(images)).softmax(1)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each picture.

    Raises:
        UserError: no picture is named, or the checkpoint cannot be used.
        SystemExit: a picture could not be read (status 2), and the others were predicted.
    """
    asked = parse_flags(Prediction, argv, prog="python -m cifar.predict")
    if not asked.images:
        raise UserError("no picture is named: python -m cifar.predict CHECKPOINT IMAGE [IMAGE ...]")
    model, content = read_model(asked.checkpoint)
    classes, failed = content["classes"], False
    for path in asked.images:
        try:
            image = read_image(path)
        except UserError as error:  # the other pictures are predicted nevertheless
            print(f"cifar.predict: error: {error}", file=sys.stderr)
            failed = True
            continue
        (row,) = predict(model, image[None])
        top = row.topk(min(3, len(classes)))
        ranking = [f"{classes[i]} {100 * p:.1f} %" for p, i in zip(top.values, top.indices, strict=True)]
        print(f"{path}: {', '.join(ranking)}")
    if content["dataset"] == "synthetic":
        print(SYNTHETIC_WARNING, file=sys.stderr)
    if failed:
        raise SystemExit(UserError.status)


if __name__ == "__main__":
    with exit_on_error("cifar.predict"):
        main()
