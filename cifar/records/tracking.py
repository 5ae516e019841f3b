"""The records of a run, which rank zero writes: config.json, metrics.jsonl, the W&B run, result.json, the report."""

import platform
import subprocess
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import Tensor

import cifar
from cifar.batch_plan import BatchPlan
from cifar.checkpoint import TrainState
from cifar.config import TrainConfig
from cifar.errors import count, first_line
from cifar.evaluation import Evaluation
from cifar.files import read_json, write_json
from cifar.records.metrics import OF_A_START, LogPoint, MetricsFile, numbers, parts, starts
from cifar.records.wandb_logger import WandbRun


def software() -> dict[str, Any]:
    """Return the versions that the numbers of a run depend on."""
    return {
        "version": cifar.__version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
    }


def _git_commit() -> str | None:
    """Return the commit of this source tree, with "-dirty" if files have changed; None if it is not a git checkout."""
    root = Path(__file__).resolve().parents[2]
    checkout = [f"--git-dir={root}/.git", f"--work-tree={root}"]  # not that of a directory above
    command = ["git", *checkout, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write_config(config: TrainConfig, facts: dict[str, Any], step: int, hosts: int) -> dict[str, Any]:
    """Write config.json of a start that begins after `step`; return the facts with all starts of the run.

    A start whose steps are all trained again is left out.
    """
    assert config.run_dir is not None
    path = config.run_dir / "config.json"
    earlier = starts(read_json(path)) if path.exists() else []
    start = {"step": step, "time": datetime.now().astimezone().isoformat(timespec="seconds"), "hosts": hosts}
    start |= {name: facts[name] for name in OF_A_START}
    facts = facts | {"starts": [*(each for each in earlier if each["step"] < step), start]}
    write_json(path, {"config": config.to_json(), **facts})
    return facts


def make_result(
    config: TrainConfig, facts: dict[str, Any], plan: BatchPlan, state: TrainState, test: Evaluation
) -> dict[str, Any]:
    """Return what result.json holds, but for the test with augmentation; `facts` are those of config.json."""
    trained_on = parts(facts, state.step, "world_size", "device")
    return {
        **{name: getattr(config, name) for name in ("recipe", "model", "epochs", "seed", "precision", "tta")},
        "dataset": facts["dataset"],
        "image_size": facts["image_size"],
        "steps": state.step,
        "trained_on": ", then ".join(f"{count(size, 'process', 'es')} on {device}" for size, device in trained_on),
        "world_size": plan.world_size,
        "local_batch_size": plan.micro_batch_sizes(rank=0)[0],
        "global_batch_size": plan.global_batch_size,
        "device": facts["device"],
        "train_seconds": state.train_seconds,
        "first_step_seconds": state.first_step_seconds,
        "images_per_second": state.step * plan.global_batch_size / state.train_seconds,
        "test_loss": test.loss,
        "test_correct": test.correct,
        "test_total": test.total,
        "test_accuracy": test.accuracy,
        "test_class_accuracy": list(test.class_accuracies().values()),
        "best_accuracy": state.best_accuracy,
        "best_step": state.best_step,
    }


class Tracking:
    """The records of a run in progress, on rank zero; the other ranks write nothing."""

    def __init__(
        self, config: TrainConfig, facts: dict[str, Any], step: int, accelerator: Any, print_line: Callable[[str], None]
    ) -> None:
        """Open the records in `config.run_dir`, and drop those after `step`, at which the run continues.

        `facts` is what config.json holds besides `config`, and `accelerator` accelerate's `Accelerator`.
        """
        assert config.run_dir is not None
        self._dir, self._print = config.run_dir, print_line
        self._accelerator, self._is_main = accelerator, accelerator.is_main_process
        self._metrics = MetricsFile(self._dir)
        self._row: dict[str, Any] = {}
        recorded = self._metrics.keep_until(step) if self._is_main else []
        self._wandb = WandbRun(self._dir, self._is_main and config.wandb != "disabled", print_line)
        self._wandb.start(config, facts, recorded)
        # accelerate logs to a list of trackers; append to it for TensorBoard, MLflow and others.
        accelerator.trackers = [self._wandb]

    def describe(self) -> str:
        """Return where the W&B run is; see `WandbRun.describe`."""
        return self._wandb.describe()

    def log_train(self, point: LogPoint, test_follows: bool = False) -> None:
        """Record training metrics. `test_follows`: `log_test` is called next, for the same step."""
        values = {
            "epoch": point.epoch,
            "train/loss": point.loss,
            "train/lr": point.lr,
            "train/images_per_second": point.images_per_second,
        }
        self._log(point.step, values, complete=not test_follows)

    def log_test(self, step: int, epoch: int, test: Evaluation) -> None:
        """Record an evaluation: loss, accuracy, and accuracy per class."""
        classes = {f"test_class/{name}": accuracy for name, accuracy in test.class_accuracies().items()}
        self._log(step, {"epoch": epoch, "test/loss": test.loss, "test/accuracy": test.accuracy, **classes})

    def _log(self, step: int, values: dict[str, Any], complete: bool = True) -> None:
        if not self._is_main:
            return
        self._metrics.log(step, values)
        # A W&B step cannot be added to after a resume: send its training and test metrics together, or neither.
        self._row |= numbers(values)
        if complete:
            self._accelerator.log(self._row, step=step)
            self._row = {}

    def finish(self, step: int, result: dict[str, Any], test: Evaluation, images: Tensor, best: Path) -> None:
        """Record the result in W&B and in result.json, and draw the report. What fails here is a warning.

        `test` is the last evaluation, of `images`, uint8 [n, 3, size, size]; `best` the most accurate checkpoint.
        """
        self._wandb.log_result(step, result, test, images, best)
        try:
            write_json(self._dir / "result.json", result)
        except OSError as error:
            self._print(f"WARNING: result.json cannot be written to {self._dir}: {error}")
            return
        try:
            from cifar.records.report import write_report  # matplotlib takes a second to import

            write_report(self._dir, test, images)
        except Exception as error:  # nothing that draws may fail a finished run
            self._print(f"WARNING: no report in {self._dir}: {type(error).__name__}: {first_line(error)}")
        else:
            self._print(f"records, index.html and report.png are in {self._dir}")

    def close(self, exit_code: int = 0, preempting: bool = False) -> None:
        """Finish the W&B run."""
        self._wandb.close(exit_code, preempting)
