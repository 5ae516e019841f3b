"""The records of a run, made by rank zero: W&B, metrics.jsonl and result.json."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cifar.config import TrainConfig
from cifar.data import Data
from cifar.distributed.runtime import Runtime
from cifar.evaluation import Evaluation
from cifar.metrics import MetricsFile
from cifar.train_state import LogPoint
from cifar.wandb_logger import STEP_AXIS, define_metrics, end_wandb, finish, first_line, pictures, replay, start_wandb


class Tracking:
    """What a run records, on every rank; only rank zero writes."""

    def __init__(
        self, config: TrainConfig, runtime: Runtime, run_dir: Path, data: Data, facts: dict[str, Any], step: int = 0
    ) -> None:
        """Open the records. `facts` go into W&B's configuration beside `config`."""
        self._accelerator = runtime.accelerator
        self._runtime, self._data = runtime, data
        self.metrics = MetricsFile(run_dir / "metrics.jsonl")
        # accelerate logs through trackers of its own kind; others of them (TensorBoard, MLflow, ...) can be added here.
        self._accelerator.trackers = []
        recorded = self.metrics.keep_until(step) if runtime.is_main else []
        self._held: dict[str, Any] = {}
        self._wandb = start_wandb(config, runtime, run_dir)
        self._started = self._wandb is not None
        if self._wandb is not None:
            self._accelerator.trackers.append(self._wandb)
            with self._surviving_wandb():
                self._wandb.store_init_configuration(config.to_json() | facts)
                define_metrics(self._wandb.tracker)
                replay(self._wandb.tracker, recorded, run_dir)

    def describe(self) -> str:
        """Where W&B's record goes, for the banner."""
        if self._wandb is None:
            return "no record"
        run = self._wandb.tracker
        if run.disabled:
            return "no record"
        return f"offline, upload with: wandb sync {Path(run.dir).parent}" if run.offline else str(run.url)

    def log_train(self, point: LogPoint, test_follows: bool = False) -> None:
        """Record a log point, after whose step an evaluation may be recorded, too."""
        values = {
            "epoch": point.epoch,
            "train/loss": point.loss,
            "train/lr": point.lr,
            "train/images_per_second": point.images_per_second,
        }
        self._log(point.step, values, hold=test_follows)

    def log_test(self, step: int, epoch: int, test: Evaluation) -> None:
        """Record an evaluation."""
        classes = {f"test_class/{name}": x for name, x in test.class_accuracies().items()}
        values = {"epoch": epoch, "test/loss": test.loss, "test/accuracy": test.accuracy, **classes}
        self._log(step, values)

    def finish(self, step: int, result: dict[str, Any], test: Evaluation) -> None:
        """Record the end of the run in W&B: the result, the confusion matrix and the wrong images."""
        with self._surviving_wandb():
            if self._wandb is not None:
                run = self._wandb.tracker
                # The pictures first, so that the table's are the same files.
                for name, value in pictures(self._data, test).items():
                    run.log({name: value}, step=max(step, run.step))  # an earlier start may have ended that row
                run.summary.update(result)

    def close(self, exit_code: int = 0, preempting: bool = False) -> None:
        """Finish the W&B run; waits for its server no longer than half a minute, or 4 seconds after a failure."""
        with self._surviving_wandb():
            if self._wandb is not None:
                finish(self._wandb.tracker, exit_code, preempting)
        if self._started:
            end_wandb()

    def _log(self, step: int, values: dict[str, Any], hold: bool = False) -> None:
        if not self._runtime.is_main:
            return
        self.metrics.log(step, values)
        # W&B takes one row per step. Were the run killed before the rest is there, half a row would be all it ever got.
        self._held |= values
        if not hold:
            with self._surviving_wandb():
                self._accelerator.log({STEP_AXIS: step, **self._held}, step=step)
            self._held = {}

    @contextlib.contextmanager
    def _surviving_wandb(self) -> Iterator[None]:
        """Should W&B fail in the block (its process was killed, the disk is full), the run goes on without it."""
        try:
            yield
        except Exception as error:
            if self._wandb is None:
                raise
            self._runtime.print0(f"WARNING: W&B's record ends here: {type(error).__name__}: {first_line(error)}")
            self._accelerator.trackers.remove(self._wandb)
            self._wandb = None
