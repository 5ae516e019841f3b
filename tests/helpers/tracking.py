"""Records of a run without its training: a Tracking, made-up metrics, and W&B's reader of .wandb files."""

import contextlib
import json
import subprocess

import torch

from cifar.config import TrainConfig
from cifar.evaluation import Evaluation
from cifar.records.metrics import LogPoint
from cifar.records.tracking import Tracking

CLASSES = ("cat/dog", "sea lion", *"abcdefgh")


def random_images():
    """Return 100 random images, uint8 [100, 3, 32, 32]."""
    return torch.randint(0, 256, (100, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def evaluation(accuracy):
    """Return an evaluation in which the last images of every ten are taken for the next class."""
    labels = torch.arange(100) % 10
    predicted = torch.where(torch.arange(100) // 10 < 10 * accuracy, labels, (labels + 1) % 10)
    losses = torch.full((100,), 1 - accuracy, dtype=torch.float64)
    return Evaluation(losses, labels, predicted, torch.linspace(0.1, 1, 100, dtype=torch.float64), CLASSES)


def point(step):
    """Return the training metrics of a step, with loss 1 / step."""
    return LogPoint(step, 1, step, 1 / step, 0.1, 100.0)


@contextlib.contextmanager
def tracking(runtime, run_dir, choice="offline", facts=None, step=0):
    """Yield the Tracking of a start of the run, which continues after `step`."""
    config = TrainConfig(device="cpu", wandb=choice, run_dir=run_dir)
    tracked = Tracking(config, facts or {}, step, runtime.accelerator, runtime.print0)
    try:
        yield tracked
    finally:
        runtime.accelerator.trackers = []


def offline_runs(run_dir):
    """Return the directories of W&B's offline runs that `wandb sync` would upload."""
    return sorted(run_dir.glob("wandb/offline-run-*"))


def read_back(wandb_run):
    """Return the records of the .wandb file in a directory, as `wandb leet inspect` prints them, by type."""
    from wandb.util import get_core_path

    (path,) = wandb_run.glob("*.wandb")
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", path, wandb_run]
    found: dict[str, list] = {}
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        record = json.loads(line)
        found.setdefault(record["type"], []).append(record.get(record["type"]))
    return found


def merged(updates):
    """Return the last value of each key of W&B's config or summary records."""
    return {key: value for update in updates for key, value in update["update"].items()}
