"""Runs small enough for a test, and what tells whether two of them came to the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar.augment import CropFlip
from cifar.checkpoint import CheckpointWriter
from cifar.data import Data, DeviceImages


def tiny_data(name: str = "synthetic", count: int = 200) -> Data:
    """Noise with labels, augmented: training on it takes milliseconds, and any other order shows in the numbers."""
    device = torch.device("cpu")
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(count) % 10
    data = Data(name, DeviceImages(images, labels, device), DeviceImages(images, labels, device))
    data.train.augment = CropFlip(count, 0, device)
    return data


def wait_for_checkpoints(patched: pytest.MonkeyPatch) -> None:
    """Let training wait until each checkpoint is on the disk: a slow one would cost some of those between."""
    save = CheckpointWriter.save

    def save_and_wait(writer: CheckpointWriter, content: dict[str, Any]) -> None:
        save(writer, content)
        writer.flush()

    patched.setattr(CheckpointWriter, "save", save_and_wait)


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """Every record in metrics.jsonl but those that depend on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "train/images_per_second"} for line in lines]


def same(a: Any, b: Any) -> bool:
    """Whether two states of training are the same, bit for bit, but for the time they took."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "train_seconds")
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def traces(folder: Path) -> dict[str, Any]:
    """Everything in `folder` by its name: of files their bytes and when they were written."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
        for path in folder.rglob("*")
    }
