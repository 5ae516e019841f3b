"""Runs that are small enough for a unit test, and comparisons of their results."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cifar.checkpoint import CheckpointWriter
from cifar.datasets import DATASETS
from cifar.datasets.base import Dataset
from cifar.datasets.cifar10 import CLASSES


def tiny_dataset(size: int = 200, classes: tuple[str, ...] = CLASSES) -> Dataset:
    """Return noise with labels: training on it takes milliseconds, and depends on the order of the images."""
    images = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    split = images, torch.arange(size) % len(classes)
    return Dataset(classes, split, split)


def make_runs_tiny(patched: pytest.MonkeyPatch, size: int = 200) -> None:
    """Use the tiny dataset, write no report, and wait for each checkpoint."""
    patched.setitem(DATASETS, "synthetic", lambda _: tiny_dataset(size))
    write_no_report(patched)
    wait_for_checkpoints(patched)


def write_no_report(patched: pytest.MonkeyPatch) -> None:
    """Leave out report.png and index.html: drawing them would take most of the time of a small run."""
    patched.setitem(sys.modules, "cifar.records.report", SimpleNamespace(write_report=lambda *_: None))


def shrink_synthetic(patched: pytest.MonkeyPatch, train_size: int = 5_000, test_size: int = 1_000) -> None:
    """Make the synthetic dataset smaller."""
    patched.setattr("cifar.datasets.synthetic.TRAIN_SIZE", train_size)
    patched.setattr("cifar.datasets.synthetic.TEST_SIZE", test_size)


def wait_for_checkpoints(patched: pytest.MonkeyPatch) -> None:
    """Let training wait until each checkpoint is on disk, so that none is left out on a slow one."""
    save = CheckpointWriter.save

    def save_and_wait(writer: CheckpointWriter, content: dict[str, Any]) -> None:
        save(writer, content)
        writer.flush()

    patched.setattr(CheckpointWriter, "save", save_and_wait)


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl without the values that depend on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "train/images_per_second"} for line in lines]


def same(a: Any, b: Any) -> bool:
    """Return whether two training states have the same bits, apart from the seconds they took."""
    clock = ("train_seconds", "first_step_seconds")
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in clock)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def traces(directory: Path) -> dict[str, Any]:
    """Return the bytes and the time of modification of each file below `directory`, by name; of a lock, the bytes."""
    found: dict[str, Any] = {}
    for path in directory.rglob("*"):
        modified = None if path.name == ".lock" else path.stat().st_mtime_ns
        found[str(path.relative_to(directory))] = (path.read_bytes(), modified) if path.is_file() else None
    return found
