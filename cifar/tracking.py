"""Record a run in metrics.jsonl and in W&B, from rank zero."""

import contextlib
import itertools
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from cifar.config import TrainConfig
from cifar.data import Data
from cifar.distributed.runtime import Runtime
from cifar.errors import first_line
from cifar.evaluation import Evaluation
from cifar.files import read_json
from cifar.metrics import MetricsFile, numbers
from cifar.train_state import LogPoint
from cifar.wandb_logger import (
    STEP_AXIS,
    charted,
    check_log_model,
    define_metrics,
    finish,
    log_model,
    pictures,
    replay,
    start_wandb,
    stop_wandb,
)  # fmt: skip


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
        self._accelerator = runtime.accelerator
        self._runtime, self._data, self._run_dir = runtime, data, run_dir
        self._metrics = MetricsFile(run_dir / "metrics.jsonl")
        # accelerate logs to a list of trackers; append to it for TensorBoard, MLflow and others.
        self._accelerator.trackers = []
        recorded = self._metrics.keep_until(step) if runtime.is_main else []
        self._row: dict[str, Any] = {}
        self._wandb = start_wandb(config, runtime, run_dir)
        self._started = self._wandb is not None
        if self._wandb is not None:
            self._accelerator.trackers.append(self._wandb)
            with self._survive_wandb():
                self._wandb.store_init_configuration(config.to_json() | facts)
                define_metrics(self._wandb.tracker)
                replay(self._wandb.tracker, recorded)
                check_log_model(runtime.print0)

    def describe(self) -> str:
        """Return where the W&B run is, for the banner: a URL, the command that uploads it, or "no record"."""
        if self._wandb is None:
            return "no record"
        run = self._wandb.tracker
        if run.disabled:
            return "no record"
        return f"offline, upload with: wandb sync {Path(run.dir).parent}" if run.offline else str(run.url)

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
        """Record the result, the confusion matrix, the most confidently wrong images and the model in W&B.

        Args:
            best: the checkpoint with the best test accuracy.
        """
        with self._survive_wandb():
            if self._wandb is not None:
                run = self._wandb.tracker
                run.summary.update(result)  # before the pictures, which may fail
                # One call each, in this order: W&B stores an image once, where the list has it, and the table refers
                # to that file. A resumed run may be beyond `step` already.
                for name, value in pictures(self._data, test).items():
                    run.log({name: value}, step=max(step, run.step))
                about = ("dataset", "model", "recipe", "best_step", "best_accuracy")
                log_model(run, best, {name: result.get(name) for name in about} | {"classes": list(test.classes)})

    def close(self, exit_code: int = 0, preempting: bool = False) -> None:
        """Finish the W&B run. A silent server is waited for at most 30 s, or 4 s if `exit_code` is not 0."""
        with self._survive_wandb():
            if self._wandb is not None:
                finish(self._wandb.tracker, exit_code, preempting)
        if self._started:
            stop_wandb(self._run_dir)

    def _log(self, step: int, values: dict[str, Any], complete: bool = True) -> None:
        if not self._runtime.is_main:
            return
        self._metrics.log(step, values)
        values = charted(numbers(values))
        # A W&B step cannot be added to after a resume: send its training and test metrics together, or neither.
        self._row |= values
        if complete:
            with self._survive_wandb():
                self._accelerator.log({STEP_AXIS: step, **self._row}, step=step)
            self._row = {}

    @contextlib.contextmanager
    def _survive_wandb(self) -> Iterator[None]:
        """Turn an exception of W&B (killed service, full disk) into a warning, and continue without W&B."""
        try:
            yield
        except Exception as error:
            if self._wandb is None:
                raise
            reason = f"{type(error).__name__}: {first_line(error)}"
            self._runtime.print0(f"WARNING: W&B's record is incomplete, metrics.jsonl is not: {reason}")
            self._accelerator.trackers.remove(self._wandb)
            self._wandb = None


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
