"""Classify picture files: python -m cifar.predict CHECKPOINT IMAGE [IMAGE ...]"""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from cifar.checkpoint import load_model, read_checkpoint
from cifar.cli import exit_on_error, parse_flags
from cifar.console import SYNTHETIC_WARNING
from cifar.data import normalize
from cifar.errors import UserError
from cifar.models import MODELS, build_model


@dataclass(frozen=True)
class Prediction:
    """Name the three most probable classes of each picture."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A checkpoint of train_ddp.py, runs/NAME/checkpoints/step-NNNNNNNN.pt."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Pictures in any format that Pillow reads; the middle square is scaled to 32 x 32."""


def read_image(path: Path) -> Tensor:
    """Read a picture file as the models expect it: uint8 [3, 32, 32].

    Raises:
        UserError: the file cannot be read as a picture.
    """
    try:
        with warnings.catch_warnings():
            # Large pictures are fine; Pillow itself refuses those ten times larger than any camera's.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                upright = _to_rgb(ImageOps.exif_transpose(file))
        pixels = np.asarray(ImageOps.fit(upright, (32, 32), Image.Resampling.LANCZOS))
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is not a picture in a format that Pillow knows") from error
    except Exception as error:  # a damaged or hostile file can make a decoder raise anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{path} cannot be read as a picture: {reason}") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return `image` as a viewer shows it: 16-bit gray scaled, where Pillow clips it; transparency on white."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


@torch.no_grad()
def predict(model: torch.nn.Module, images: Tensor) -> Tensor:
    """Return class probabilities, float32 [n, classes], of `images`, uint8 [n, 3, 32, 32]."""
    model.eval()
    return model(normalize(images)).softmax(1)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each picture."""
    asked = parse_flags(Prediction, argv, prog="python -m cifar.predict")
    if not asked.images:
        raise UserError("no picture is named: python -m cifar.predict CHECKPOINT IMAGE [IMAGE ...]")
    content = read_checkpoint(asked.checkpoint)
    name, classes = content["config"].get("model"), content["classes"]
    if name not in MODELS:
        raise UserError(f"{asked.checkpoint} holds a model {name!r}, which this version does not have")
    model = build_model(name, len(classes))
    load_model(model, content, name, asked.checkpoint)
    probabilities = predict(model, torch.stack([read_image(path) for path in asked.images]))
    for path, row in zip(asked.images, probabilities, strict=True):
        top = row.topk(min(3, len(classes)))
        ranking = [f"{classes[i]} {100 * p:.1f} %" for p, i in zip(top.values, top.indices, strict=True)]
        print(f"{path}: {', '.join(ranking)}")
    if content["dataset"] == "synthetic":
        print(SYNTHETIC_WARNING, file=sys.stderr)


if __name__ == "__main__":
    with exit_on_error("cifar.predict"):
        main()
