"""The life of one run: it opens its directory, trains step by step, stops when it is asked to, and finishes."""

import contextlib
import dataclasses
import math
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import nn

from cifar.augment import derive_seed
from cifar.checkpoint import FORMAT, CheckpointWriter, TrainState, checkpoint_path
from cifar.config import TrainConfig
from cifar.data import Data
from cifar.distributed.ddp import HookMemory, settle_buckets, unwrap
from cifar.distributed.preemption import StopAgreement, StopRequest
from cifar.distributed.runtime import Runtime
from cifar.errors import StoppedError, TrainingDivergedError, UserError
from cifar.evaluation import Evaluation, evaluate
from cifar.records.console import Console, print_test
from cifar.records.metrics import LogPoint
from cifar.records.profiler import StepProfiler
from cifar.records.run_dir import RunLock, check_unused, check_writable, create_run_dir
from cifar.records.tracking import Tracking, make_result, software, write_config
from cifar.resume import Resumed, restore


class Run:
    """One run, new or resumed; a context manager that closes its records, however the training ends.

    Every rank has one and calls the same methods; rank zero writes and prints.

    Attributes:
        config: the configuration, resolved: with the run directory and the global batch size.
        runtime, data: as passed.
        plan: the batch arithmetic.
        state: everything that changes during training.
        first_step: the first step that this process trains.
        layer_seed: that of this rank's random layers, such as dropout, to which each step is added.
        dir: the run directory.
    """

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        data: Data,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Create the run directory, or restore the run of `--resume`; then print the banner.

        Raises:
            UserError: the directory cannot be used, or there is nothing to resume.
            StoppedError: the run had finished, which is no mistake after a restart or with --autoresume.
        """
        self.runtime, self.data, self.plan = runtime, data, data.plan
        settle_buckets(model, data.train.dataset.images[:2])
        self.state = TrainState(unwrap(model), optimizer, runtime.scaler, HookMemory(model))
        self._last_step = self.plan.last_step(config)
        self._lock: RunLock | None = None
        self._stopping = self._closing = False
        self._test: Evaluation | None = None
        self._profiler: StepProfiler | None = None
        try:
            resumed = self._open(config)
        except (UserError, StoppedError):
            if self._lock is not None:
                self._lock.release(undo=True)
            raise
        self.first_step = self.state.step + 1
        self.layer_seed = derive_seed(config.seed, "layers", runtime.rank)
        self._start_records(resumed)
        self._request = StopRequest(runtime.launch, self._cannot_end)
        self._agreement = StopAgreement(runtime, self._request)

    def _open(self, config: TrainConfig) -> Resumed | None:
        """Create or find the run directory, lock it, restore the state, and record the configuration."""
        runtime, resumed = self.runtime, None
        launches = [launch for launch in dict.fromkeys(runtime.gather(runtime.launch_id)) if launch is not None]
        run_dir: Path | None = None
        with runtime.fail_together():
            if runtime.is_main:
                run_dir = config.resume or create_run_dir(config.run_dir, config.recipe)
                self._lock = RunLock(run_dir)
                if config.resume is None:
                    check_unused(run_dir)
        self.dir = runtime.from_main(run_dir)
        if config.resume is not None:
            is_own = runtime.from_main(self._lock and self._lock.owned_by(launches))
            resumed = restore(config, runtime, self.data, self.state, config.autoresume or bool(is_own))
        batch_size = self.plan.global_batch_size
        self.config = dataclasses.replace(
            config, run_dir=self.dir, resume=None, autoresume=False, global_batch_size=batch_size
        )
        self._facts = self._environment()
        with runtime.fail_together():
            if self._lock is not None:
                check_writable(self.dir, self.state.model)
                # A directory is a run once it has a config.json; from then on, a restart must recognize it.
                self._lock.record_owner(launches)
                self._facts = write_config(self.config, self._facts, self.state.step, runtime.launch.hosts)
        return resumed

    def _environment(self) -> dict[str, Any]:
        """Return what the numbers of a run depend on besides its configuration."""
        return {
            "dataset": self.data.name,
            "images": self.data.fingerprint,
            "decoder": self.data.decoder,
            "image_size": self.data.image_size,
            "world_size": self.runtime.world_size,
            "accumulation": self.plan.accumulation,
            "steps_per_epoch": self.plan.steps_per_epoch,
            "device": self.runtime.device.type,
            **(software() if self.runtime.is_main else {}),
        }

    def _start_records(self, resumed: Resumed | None) -> None:
        """Open the records, and print the banner."""
        config, runtime, state = self.config, self.runtime, self.state
        newest = resumed.checkpoint if resumed else None
        self._writer = CheckpointWriter(self.dir, config.keep_checkpoints, runtime.print0, newest)
        self._tracking = Tracking(config, self._facts, state.step, runtime.accelerator, runtime.print0)
        self._console = Console(config, self.plan, runtime.print0, runtime.is_main)
        self._console.banner(
            device=runtime.device,
            hosts=runtime.launch.hosts,
            dataset=self.data.describe(config.data_dir),
            is_synthetic=self.data.name == "synthetic",
            parameters=sum(parameter.numel() for parameter in state.model.parameters()),
            run_dir=self.dir,
            wandb=self._tracking.describe(),
            resumed=resumed.describe(state.step, self._last_step) if resumed else {},
        )

    def __enter__(self) -> "Run":
        self.runtime.end_start()  # W&B may have kept rank zero waiting
        self._request.__enter__()
        self._console.start_bar(self.state.step)
        if self.config.profile:
            on_gpu = self.runtime.device.type == "cuda"
            self._profiler = StepProfiler(self.dir, self.runtime.rank, on_gpu, self.runtime.print0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        stopped = isinstance(error, StoppedError)
        with contextlib.ExitStack() as stack:  # in reverse order, and each even if another fails
            if self._lock is not None:
                stack.callback(self._lock.release)
            if stopped:
                stack.callback(self._agreement.leave_together)
            stack.callback(self._request.__exit__, kind, error, trace)
            if stopped:
                stack.callback(self.runtime.print0, str(error))
            stack.callback(self._tracking.close, exit_code=0 if kind is None else 1, preempting=stopped)
            stack.callback(self._writer.flush)
            stack.callback(self._console.close)
            if self._profiler is not None:
                stack.callback(self._profiler.close)
        if isinstance(error, TrainingDivergedError):
            newest = self._writer.newest or "none"
            raise TrainingDivergedError(f"{error}; last good checkpoint: {newest}; try a lower --lr") from None

    @property
    def finished(self) -> bool:
        """Return whether the last step is done."""
        return self.state.step >= self._last_step

    def after_step(self) -> bool:
        """Advance the progress bar; return True, on all ranks after the same step, once a rank was asked to stop."""
        self._console.after_step()
        end_of_epoch = self.state.step % self.plan.steps_per_epoch == 0
        self.runtime.note_step(self.state.step, last=end_of_epoch or self.finished)
        if self._profiler is not None:
            self._profiler.after_step(last=self.finished)
        self._stopping = self._agreement.after_step() or self._stopping
        return self._stopping

    def log(self, point: LogPoint) -> None:
        """Print and record training metrics, and begin a new running loss."""
        self._console.log(point)
        test_follows = point.epoch_step == self.plan.steps_per_epoch or self.finished
        self._tracking.log_train(point, test_follows)
        self.state.running_loss.zero_()
        self.state.running_steps = 0

    def save_checkpoint(self) -> None:
        """Write a checkpoint of this step in the background. Collective."""
        ranks = self.runtime.gather(self.state.rank_state(self.runtime.rank))
        if self.runtime.is_main:
            self._writer.save({
                "format": FORMAT,
                "config": self.config.to_json(),
                "dataset": self.data.name,
                "classes": list(self.data.classes),
                "image_size": self.data.image_size,
                "state": self.state.state_dict(ranks),
            })  # fmt: skip

    def end_epoch(self, test: Evaluation) -> None:
        """Record the test after an epoch, or after the last step, and save a checkpoint.

        Raises:
            TrainingDivergedError: the test loss is not finite, so that there is nothing worth saving.
            StoppedError: some rank was asked to stop.
        """
        state = self.state
        if not math.isfinite(test.loss):
            lr = state.optimizer.param_groups[0]["lr"]
            raise TrainingDivergedError(f"the test loss became {test.loss} after step {state.step}, with lr {lr:g}")
        if test.accuracy > state.best_accuracy:
            state.best_accuracy, state.best_step = test.accuracy, state.step
        epoch = math.ceil(state.step / self.plan.steps_per_epoch)
        self._test = test
        self._console.log_test(state.step, test)
        self._tracking.log_test(state.step, epoch, test)
        self.save_checkpoint()
        if self._stopping and not self.finished:
            self.stop()

    def finish(self) -> None:
        """Print the accuracies of the finished run; write result.json, report.png and index.html. Collective."""
        state, runtime, tta = self.state, self.runtime, self.config.tta
        # Without one, the run was killed after its last step and resumed.
        test = self._test or evaluate(state.model, self.data.test, runtime)
        tta_test = evaluate(state.model, self.data.test, runtime, tta, test) if tta != "none" else None
        self._console.finish(state.train_seconds, state.first_step_seconds)
        print_test(runtime.print0, self.data.name, test, tta_test)
        if runtime.is_main:
            self._writer.flush()
            result = make_result(self.config, self._facts, self.plan, state, test)
            result["test_accuracy_tta"] = tta_test and tta_test.accuracy
            result["checkpoint_seconds"] = self._writer.waited_seconds
            best = checkpoint_path(self.dir, state.best_step)
            self._tracking.finish(state.step, result, test, self.data.test.dataset.images, best)

    def stop(self) -> NoReturn:
        """Stop after this step, whose checkpoint has been saved."""
        self._writer.flush()
        raise self._agreement.stopped(f"after step {self.state.step:,} of {self._last_step:,}", self.dir)

    def _cannot_end(self) -> bool:
        """Return whether training waits for a process that is gone, and no checkpoint or record is being completed."""
        return self.runtime.peer_is_gone and not self._closing and self._writer.idle
