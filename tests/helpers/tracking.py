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
IMAGES = torch.randint(0, 256, (100, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def evaluation(accuracy):
    """Return an evaluation of IMAGES in which the last images of every ten are taken for the next class."""
    labels = torch.arange(100) % 10
    predicted = torch.where(torch.arange(100) // 10 < 10 * accuracy, labels, (labels + 1) % 10)
    losses = torch.full((100,), 1 - accuracy, dtype=torch.float64)
    return Evaluation(losses, labels, predicted, torch.linspace(0.1, 1, 100, dtype=torch.float64), CLASSES)


def point(step):
    """Return the training metrics of a step, with loss 1 / step."""
    return LogPoint(step, 1, step, 1 / step, 0.1, 100.0)


@contextlib.contextmanager
def tracking(runtime, run_dir, choice="offline", facts=None, step=0, **close):
    """Yield the Tracking of a start of the run, which continues after `step`; then close it with arguments `close`."""
    run_dir.mkdir(exist_ok=True)
    config = TrainConfig(device="cpu", wandb=choice, run_dir=run_dir)
    tracked = Tracking(config, facts or {}, step, runtime.accelerator, runtime.print0)
    try:
        yield tracked
        tracked.close(**close)
    finally:
        runtime.accelerator.trackers = []


def finish(tracked, run_dir, accuracy=0.5, step=1):
    """Record the result of a run with this test accuracy, and the file best.pt as its best checkpoint."""
    (run_dir / "best.pt").write_bytes(b"weights")
    tracked.finish(step, {"test_accuracy": accuracy}, evaluation(accuracy), IMAGES, run_dir / "best.pt")


def offline_runs(run_dir):
    """Return the directories of W&B's offline runs that `wandb sync` would upload."""
    return sorted(run_dir.glob("wandb/offline-run-*"))


def read_back(wandb_run):
    """Return what the .wandb file in a directory holds, as `wandb leet inspect` prints it.

    By type of record, a list; but the history is a list of rows, and configuration and summary are the last values.
    """
    from wandb.util import get_core_path

    (path,) = wandb_run.glob("*.wandb")
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", path, wandb_run]
    found: dict = {"history": [], "config": {}, "summary": {}}
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        record = json.loads(line)
        kind, content = record["type"], record.get(record["type"])
        if kind == "history":
            found[kind].append(content["item"])
        elif kind in ("config", "summary"):
            found[kind].update(content["update"])
        else:
            found.setdefault(kind, []).append(content)
    return found


def losses(rows):
    """Return (step, training loss) of the rows of a W&B history that hold one."""
    return [(row["_step"], row["train/loss"]) for row in rows if "train/loss" in row]
