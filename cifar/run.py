"""A run from its folder to its result: what is saved, recorded and said while `train_ddp.py` trains."""

import dataclasses
import math
import signal
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from cifar.batch_plan import BatchPlan
from cifar.run_dir import RunLock
from cifar.config import TrainConfig
from cifar.console import Console, print_test
from cifar.data import Data
from cifar.errors import StoppedError, TrainingDivergedError, UserError
from cifar.evaluation import Evaluation
from cifar.loop import LogPoint, TrainState
from cifar.resume import Resumed, restore
from cifar.run_dir import check_writable, create_run_dir
from cifar.distributed.runtime import Runtime
from cifar.checkpoint import CheckpointWriter
from cifar.distributed.preemption import StopAgreement, StopRequest
from cifar.tracking import Tracking


class Run:
    """One run, new or resumed; a context manager that ends its records in order, whatever ends the training.

    Every rank holds one and calls the same methods; rank zero writes and speaks.
    """

    def __init__(self, config: TrainConfig, runtime: Runtime, data: Data, plan: BatchPlan, state: TrainState) -> None:
        """Make the run's folder, or read that of `--resume` into `state`; then print the banner.

        Raises:
            UserError: the folder can't be used, or there is nothing to resume.
            StoppedError: torchrun has started a run again that had finished.
        """
        self._runtime, self._data, self._plan, self._state = runtime, data, plan, state
        self._last_step = plan.last_step(config)
        self._claim: RunLock | None = None
        self._stopping = False
        try:
            resumed = self._open(config)
        except (UserError, StoppedError):
            if self._claim is not None:
                self._claim.release(undo=True)
            raise
        self._writer = CheckpointWriter(
            self.dir, config.keep_checkpoints, runtime.print0, resumed.newest if resumed else None
        )
        self._tracking = Tracking(self.config, runtime, self.dir, data, self._facts(), state.step)
        self._console = Console(config, runtime, data, plan)
        self._console.banner(state, str(self.dir), self._tracking.describe(), resumed)
        self._request = StopRequest(runtime.launch)
        self._agreement = StopAgreement(runtime, self._request)

    def _open(self, config: TrainConfig) -> Resumed | None:
        """Take possession of the run's folder, and note there what is going on."""
        runtime, state = self._runtime, self._state
        agents = [agent for agent in runtime.gather(runtime.launch.agent()) if agent is not None]
        run_dir: Path | None = None
        with runtime.fail_together():
            if runtime.is_main:
                run_dir = config.resume or create_run_dir(config.run_dir, config.recipe)
                self._claim = RunLock(run_dir)
        self.dir = runtime.from_main(run_dir)
        resumed = None
        if config.resume is not None:
            own = runtime.from_main(self._claim and self._claim.owned_by(agents))
            resumed = restore(config, runtime, self._data.name, self._plan, state, bool(own))
        self.config = dataclasses.replace(
            config, run_dir=self.dir, resume=None, global_batch_size=self._plan.global_batch_size
        )
        with runtime.fail_together():
            if self._claim is not None:
                # Weights, momentum and the file being written beside its predecessor, with room for the records.
                parameters = sum(parameter.numel() for parameter in state.net.parameters())
                check_writable(self.dir, need=3 * 8 * parameters + (4 << 20))
                try:
                    write_json(self.dir / "config.json", {"config": self.config.to_json(), **self._facts()})
                    self._claim.record_owner(agents)
                except OSError as error:
                    raise UserError(f"the configuration can't be written into {self.dir}: {error}") from error
        return resumed

    def __enter__(self) -> "Run":
        self._request.__enter__()
        self._console.start_bar(self._state)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._console.close()
        self._writer.flush()
        stopped = isinstance(error, StoppedError)
        self._tracking.close(exit_code=0 if kind is None else 1, preempting=stopped)
        if stopped:
            self._runtime.close()
        self._request.__exit__(kind, error, trace)
        if self._claim is not None:
            self._claim.release()
        if isinstance(error, TrainingDivergedError):
            good = self._writer.newest or "none yet"
            raise TrainingDivergedError(f"{error}; last good checkpoint: {good}; try a lower --lr") from None

    @property
    def finished(self) -> bool:
        """Whether the last step has been done."""
        return self._state.step >= self._last_step

    def on_log(self, point: LogPoint) -> None:
        """Record and print a log point."""
        self._console.on_log(point)
        self._tracking.log_train(point, test_follows=point.batch == self._plan.steps_per_epoch or self.finished)

    def on_step(self) -> bool:
        """Move the progress bar; True, on all ranks after the same step, once one of them was asked to stop."""
        self._console.on_step()
        self._stopping = self._agreement.after_step() or self._stopping
        return self._stopping

    def end_epoch(self, test: Evaluation) -> None:
        """Record the evaluation after an epoch, or after the last step, and save a checkpoint.

        Raises:
            TrainingDivergedError: the test loss isn't finite, so that there is nothing worth saving.
            StoppedError: some rank was asked to stop.
        """
        if not math.isfinite(test.loss):
            raise TrainingDivergedError(
                f"the test loss became {test.loss} after step {self._state.step}, "
                f"with lr {self._state.optimizer.param_groups[0]['lr']:g}"
            )
        if test.accuracy > self._state.best_accuracy:
            self._state.best_accuracy, self._state.best_step = test.accuracy, self._state.step
        epoch = math.ceil(self._state.step / self._plan.steps_per_epoch)
        self._console.on_test(epoch, test)
        self._tracking.log_test(self._state.step, epoch, test)
        self.save()
        if self._stopping and not self.finished:
            self.stop()

    def save(self) -> None:
        """Have a checkpoint of this step written, in the background."""
        # Each rank has its own sum of losses since the last log point; all go in, so that resuming is exact.
        windows = self._runtime.gather(self._state.window_loss.item())
        if self._runtime.is_main:
            state = self._state.state_dict() | {"window_loss": windows, "accumulation": self._plan.accumulation}
            self._writer.save({"config": self.config.to_json(), "dataset": self._data.name, "state": state})

    def stop(self) -> NoReturn:
        """Leave after this step, which has been saved.

        Raises:
            StoppedError: always; says how to go on.
        """
        self._writer.flush()
        launch = self._runtime.launch
        asked = self._runtime.gather((launch.host, self._request.name))
        leaving = {host for host, name in asked if name is not None}
        names = ", ".join(sorted({name for _, name in asked if name is not None}))
        text = f"Stopped by {names} after step {self._state.step:,} of {self._last_step:,}"
        # With restarts left, the hosts that weren't asked go on without the others: torchrun takes this status for a
        # failure, and starts them again. What torchrun itself stops is restarted or not whatever the status; what it
        # doesn't know of would be restarted for any but 0.
        if launch.restarts_left > 0 and len({host for host, _ in asked} - leaving):
            raise StoppedError(
                f"{text} on host {', '.join(map(str, sorted(leaving)))}; the others go on without it",
                status=0 if launch.host in leaving else 1,
            )
        number = getattr(signal, self._request.name or "", 1)
        raise StoppedError(f"{text}; to go on: --resume {self.dir}", status=0 if launch.elastic else 128 + int(number))

    def finish(self, test: Evaluation, views: Evaluation | None = None) -> None:
        """Print the accuracies of the finished run, write result.json, report.png and index.html.

        `views` is the evaluation with test-time augmentation, where there is one.
        """
        self._console.close()
        self._runtime.print0("Finished Training")
        print_test(self._runtime, self._data, test, views)
        if not self._runtime.is_main:
            return
        result = self._result(test) | {"tta": self.config.tta, "test_accuracy_tta": views and views.accuracy}
        self._tracking.finish(self._state.step, result, test)
        try:
            write_json(self.dir / "result.json", result)
            from cifar.page import write_page
            from cifar.report import draw_report

            write_page(self.dir, test, self._data.test.images)
            draw_report(self.dir, test)
            self._runtime.print0(f"records, index.html and report.png are in {self.dir}")
        except OSError as error:
            self._runtime.print0(f"WARNING: the result could not be written into {self.dir}: {error}")
        except ImportError as error:  # the training is done, and result.json written
            self._runtime.print0(f"WARNING: no report.png: {error} (pip install matplotlib)")

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
            "local_batch_size": self._plan.local_batch_size,
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
            "best_step": state.best_step,
            "checkpoint_seconds": self._writer.waited_seconds,
        }


def versions() -> dict[str, str]:
    """What the numbers of a run depend on besides its configuration."""
    import platform

    import accelerate
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__, "accelerate": accelerate.__version__}
