"""Apply a checkpoint: to the test set, or to pictures with python -m cifar.predict CHECKPOINT IMAGE [IMAGE ...]"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn

from cifar.checkpoint import checkpoint_file, load_checkpoint, load_weights
from cifar.command import exit_on_error, parse_flags
from cifar.config import TrainConfig
from cifar.data import Data, normalize
from cifar.distributed.ddp import unwrap
from cifar.distributed.runtime import Runtime
from cifar.errors import UserError
from cifar.evaluation import evaluate
from cifar.models import MODELS, build_model
from cifar.pictures import read_image
from cifar.records.console import SYNTHETIC_WARNING, print_test


@dataclass(frozen=True)
class Prediction:
    """Name the three most probable classes of each picture."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A checkpoint of train_ddp.py, runs/NAME/checkpoints/step-NNNNNNNN.pt, or a run, for its best one."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Pictures (PNG, JPEG, WebP, ...: see cifar/README.md); the middle square is scaled as it was for training."""


def build_trained_model(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model of a checkpoint, with its weights, and the checkpoint's content.

    A UserError tells that the file is damaged, or holds a model that this version does not have.
    """
    content = load_checkpoint(path)
    name = content["config"].get("model")
    if name not in MODELS:
        raise UserError(f"{path} holds a model {name!r}, which this version does not have")
    model = build_model(name, len(content["classes"]))
    load_weights(model, content, name, path)
    return model, content


def evaluate_checkpoint(config: TrainConfig, model: nn.Module, data: Data, runtime: Runtime) -> None:
    """Print the test accuracy of the checkpoint `config.evaluate`, of this model and these classes. Collective."""
    assert config.evaluate is not None
    content = load_checkpoint(config.evaluate)
    if tuple(content["classes"]) != data.classes:
        trained = f"{config.evaluate} was trained on {content['dataset']}"
        raise UserError(f"{trained}, with other classes than those of {data.name} in {config.data_dir}: see --data-dir")
    load_weights(unwrap(model), content, config.model, config.evaluate)
    where = f"{config.evaluate}: {config.model}, trained on {content['dataset']} to step {content['state']['step']:,}"
    runtime.print0(f"{where}; testing on {data.name} in {runtime.precision}")
    test = evaluate(model, data.test, runtime)
    tta_test = evaluate(model, data.test, runtime, config.tta, test) if config.tta != "none" else None
    print_test(runtime.print0, data.name, test, tta_test)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return class probabilities, float32 [n, classes], of `images`, uint8 [n, 3, size, size]."""
    model.eval()
    return model(normalize(images)).softmax(1)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each picture; exit with status 2 if one could not be read."""
    asked = parse_flags(Prediction, argv, prog="python -m cifar.predict")
    if not asked.images:
        raise UserError("no picture is named: python -m cifar.predict CHECKPOINT IMAGE [IMAGE ...]")
    model, content = build_trained_model(checkpoint_file(asked.checkpoint))
    classes, failed = content["classes"], False
    for path in asked.images:
        try:
            image = read_image(path, content["image_size"])
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
