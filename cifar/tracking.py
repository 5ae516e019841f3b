"""Record a run in metrics.jsonl and in W&B, from rank zero."""

import itertools
from datetime import datetime
from pathlib import Path
from typing import Any

from cifar.config import TrainConfig
from cifar.data import Data
from cifar.distributed.runtime import Runtime
from cifar.evaluation import Evaluation
from cifar.files import read_json
from cifar.metrics import MetricsFile, numbers
from cifar.train_state import LogPoint
from cifar.wandb_logger import STEP_AXIS, WandbRun


class Tracking:
    """The records of a run. Every rank has one and calls the same methods; only rank zero writes."""

    def __init__(
        self, config: TrainConfig, runtime: Runtime, run_dir: Path, data: Data, facts: dict[str, Any], step: int = 0
    ) -> None:
        """Open the records.

        Args:
            facts: added to `config` in W&B's configuration of the run.
            step: the step at which the run continues; records after it are dropped.
        """
        self._runtime, self._images = runtime, data.test.dataset.images
        self._metrics = MetricsFile(run_dir / "metrics.jsonl")
        self._row: dict[str, Any] = {}
        recorded = self._metrics.keep_until(step) if runtime.is_main else []
        self._wandb = WandbRun(run_dir, runtime.is_main and config.wandb != "disabled", runtime.print0)
        self._wandb.start(config, facts, recorded)
        # accelerate logs to a list of trackers; append to it for TensorBoard, MLflow and others.
        runtime.accelerator.trackers = [self._wandb]

    def describe(self) -> str:
        """Return where the W&B run is, for the banner: a URL, the command that uploads it, or "no record"."""
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

    def finish(self, step: int, result: dict[str, Any], test: Evaluation, best: Path) -> None:
        """Record the result in W&B, with pictures of the test, and the checkpoint `best` if it is asked for."""
        self._wandb.log_result(step, result, test, self._images, best)

    def close(self, exit_code: int = 0, preempting: bool = False) -> None:
        """Finish the W&B run."""
        self._wandb.close(exit_code, preempting)

    def _log(self, step: int, values: dict[str, Any], complete: bool = True) -> None:
        if not self._runtime.is_main:
            return
        self._metrics.log(step, values)
        # A W&B step cannot be added to after a resume: send its training and test metrics together, or neither.
        self._row |= numbers(values)
        if complete:
            self._runtime.accelerator.log({STEP_AXIS: step, **self._row}, step=step)
            self._row = {}


_OF_A_START = ("world_size", "device", "version", "git_commit", "python", "torch", "accelerate")


def starts(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the starts of a run from its config.json, in order: the step after which each began, and on what.

    Of a run of an earlier version, only the last start is known; it counts for the whole run.
    """
    return facts.get("starts", [{"step": 0} | {name: facts.get(name) for name in _OF_A_START}])


def add_start(run_dir: Path, facts: dict[str, Any], step: int, hosts: int) -> list[dict[str, Any]]:
    """Return the recorded starts of the run in `run_dir` and this one, which begins after `step`.

    A start whose steps are all trained again is left out.
    """
    path = run_dir / "config.json"
    earlier = starts(read_json(path)) if path.exists() else []
    began = {"step": step, "time": datetime.now().astimezone().isoformat(timespec="seconds"), "hosts": hosts}
    own = began | {name: facts[name] for name in _OF_A_START}
    return [*(start for start in earlier if start["step"] < step), own]


def parts(facts: dict[str, Any], steps: int, *names: str) -> list[tuple[Any, ...]]:
    """Return `names` of each start that has trained a part of the first `steps` steps; equal neighbours count once."""
    values = (tuple(start[name] for name in names) for start in starts(facts) if start["step"] < max(steps, 1))
    return [value for value, _ in itertools.groupby(values)]
