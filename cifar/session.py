"""A run from its folder to its result: what is saved, recorded and said while `train_ddp.py` trains."""

import dataclasses
import math
from pathlib import Path
from types import TracebackType
from typing import Any

from cifar.batches import BatchPlan
from cifar.checkpoint import checkpoint_path, load_net, newest_checkpoint, save_checkpoint
from cifar.config import TrainConfig
from cifar.console import Console, print_test
from cifar.data import Data
from cifar.errors import TrainingDivergedError, UserError
from cifar.evaluation import Evaluation
from cifar.loop import LogPoint, TrainState
from cifar.run import check_writable, create_run, write_json
from cifar.runtime import Runtime
from cifar.tracking import Tracking


class Session:
    """One run, new or resumed; a context manager that ends its records in order, whatever ends the training.

    Every rank holds one and calls the same methods; rank zero writes and speaks.
    """

    def __init__(self, config: TrainConfig, runtime: Runtime, data: Data, plan: BatchPlan, state: TrainState) -> None:
        """Make the run's folder, or read that of `--resume` into `state`; then print the banner.

        Raises:
            UserError: the folder can't be used, or there is nothing to resume.
        """
        self._runtime, self._data, self._plan, self._state = runtime, data, plan, state
        self._last_step = plan.last_step(config)
        self._last_checkpoint: Path | None = None
        run_dir: Path | None = None
        with runtime.together():
            if runtime.is_main:
                run_dir = config.resume or create_run(config.run_dir, config.recipe)
                # Weights, momentum and the file being written beside its predecessor, with room for the records.
                parameters = sum(parameter.numel() for parameter in state.net.parameters())
                check_writable(run_dir, need=3 * 8 * parameters + (4 << 20))
        self.dir = runtime.from_main(run_dir)
        self._console = Console(config, runtime, data, plan)
        if config.resume is not None:
            with runtime.together():
                self._restore(config)
        self.config = dataclasses.replace(
            config, run_dir=self.dir, resume=None, global_batch_size=plan.global_batch_size
        )
        with runtime.together():
            if runtime.is_main:
                self._write_config()
        self._tracking = Tracking(self.config, runtime, self.dir, data, self._facts())
        self._tracking.metrics.keep_until(state.step)
        self._console.banner(state, str(self.dir), self._tracking.describe())

    def __enter__(self) -> "Session":
        self._console.start_bar(self._state)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._console.close()
        self._tracking.close(exit_code=0 if kind is None else 1)
        if isinstance(error, TrainingDivergedError):
            good = self._last_checkpoint or "none yet"
            raise TrainingDivergedError(f"{error}; last good checkpoint: {good}; try a lower --lr") from None

    @property
    def finished(self) -> bool:
        """Whether the last step has been done."""
        return self._state.step >= self._last_step

    def on_log(self, point: LogPoint) -> None:
        """Record and print a log point."""
        self._console.on_log(point)
        self._tracking.log_train(point)

    def on_step(self) -> None:
        """Move the progress bar."""
        self._console.on_step()

    def end_epoch(self, test: Evaluation) -> None:
        """Record the evaluation after an epoch, or after the last step, and save a checkpoint.

        Raises:
            TrainingDivergedError: the test loss isn't finite, so that there is nothing worth saving.
        """
        if not math.isfinite(test.loss):
            raise TrainingDivergedError(
                f"the test loss became {test.loss} after step {self._state.step}, "
                f"with lr {self._state.optimizer.param_groups[0]['lr']:g}"
            )
        self._state.best_accuracy = max(self._state.best_accuracy, test.accuracy)
        epoch = math.ceil(self._state.step / self._plan.steps_per_epoch)
        self._console.on_test(epoch, test)
        self._tracking.log_test(self._state.step, epoch, test)
        self.save()

    def save(self) -> None:
        """Write a checkpoint of this step. A full disk costs the checkpoint and a warning; the earlier ones stay."""
        # Each rank has its own sum of losses since the last log point; all go in, so that resuming is exact.
        windows = self._runtime.gather(self._state.window_loss.item())
        if not self._runtime.is_main:
            return
        path = checkpoint_path(self.dir, self._state.step)
        state = self._state.state_dict() | {"window_loss": windows}
        try:
            save_checkpoint(path, {"config": self.config.to_json(), "dataset": self._data.name, "state": state})
            self._last_checkpoint = path
        except OSError as error:
            self._runtime.say(
                f"WARNING: no checkpoint at step {self._state.step}: {error}; the earlier ones are as they were"
            )

    def finish(self, test: Evaluation) -> None:
        """Print the accuracies of the finished run, write result.json and draw report.png."""
        self._console.close()
        self._runtime.say("Finished Training")
        print_test(self._runtime, self._data, test)
        if not self._runtime.is_main:
            return
        result = self._result(test)
        self._tracking.finish(self._state.step, result, test)
        try:
            write_json(self.dir / "result.json", result)
            from cifar.report import draw_report

            draw_report(self.dir, test)
            self._runtime.say(f"records and report.png are in {self.dir}")
        except OSError as error:
            self._runtime.say(f"WARNING: the result could not be written into {self.dir}: {error}")
        except ImportError as error:  # the training is done, and result.json written
            self._runtime.say(f"WARNING: no report.png: {error} (pip install matplotlib)")

    def _write_config(self) -> None:
        try:
            write_json(self.dir / "config.json", {"config": self.config.to_json(), **self._facts()})
        except OSError as error:
            raise UserError(f"the configuration can't be written into {self.dir}: {error}") from error

    def _restore(self, config: TrainConfig) -> None:
        path, content, complaints = newest_checkpoint(self.dir)
        for complaint in complaints:
            self._runtime.say(f"WARNING: passed over: {complaint}")
        if content["dataset"] != self._data.name:
            raise UserError(
                f"--resume {self.dir}: that run trains on {content['dataset']}, and the data here is "
                f"{self._data.name}: see --data-dir"
            )
        load_net(self._state.net, content, config.model, path)
        windows = content["state"]["window_loss"]
        # With another world size there is no rank to give each sum back to; their mean gives the same average.
        same = len(windows) == self._runtime.world_size
        own = windows[self._runtime.rank] if same else sum(windows) / len(windows)
        self._state.load_state_dict(content["state"] | {"window_loss": own})
        self._last_checkpoint = path
        if self.finished:
            raise UserError(
                f"--resume {self.dir}: that run has finished, with step {self._state.step:,} of "
                f"{self._last_step:,}; more --epochs or --max-steps would continue it"
            )

    def _facts(self) -> dict[str, Any]:
        return {
            "dataset": self._data.name,
            "world_size": self._runtime.world_size,
            "accumulation": self._plan.accumulation,
            "steps_per_epoch": self._plan.steps_per_epoch,
            "device": str(self._runtime.device.type),
            **versions(),
        }

    def _result(self, test: Evaluation) -> dict[str, Any]:
        config, state = self.config, self._state
        return {
            "recipe": config.recipe,
            "dataset": self._data.name,
            "model": config.model,
            "epochs": config.epochs,
            "steps": state.step,
            "world_size": self._runtime.world_size,
            "local_batch_size": config.local_batch_size,
            "global_batch_size": self._plan.global_batch_size,
            "seed": config.seed,
            "precision": config.precision,
            "device": self._runtime.device.type,
            "train_seconds": state.train_seconds,
            "images_per_second": state.step * self._plan.global_batch_size / state.train_seconds,
            "test_loss": test.loss,
            "test_correct": test.correct,
            "test_total": test.total,
            "test_accuracy": test.accuracy,
            "test_class_accuracy": test.class_accuracies(),
            "best_accuracy": state.best_accuracy,
        }


def versions() -> dict[str, str]:
    """What the numbers of a run depend on besides its configuration."""
    import platform

    import accelerate
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__, "accelerate": accelerate.__version__}
