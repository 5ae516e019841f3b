"""One run from its directory to its result: checkpoints, records, console output, stopping."""

import contextlib
import dataclasses
import math
import platform
import signal
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import accelerate
import torch
from torch import nn

import cifar
from cifar.batch_plan import count
from cifar.checkpoint import FORMAT, CheckpointWriter, checkpoint_path, load_model, read_checkpoint
from cifar.config import TrainConfig
from cifar.console import Console, print_test
from cifar.data import Data
from cifar.distributed.preemption import StopAgreement, StopRequest
from cifar.distributed.runtime import Runtime, unwrap
from cifar.errors import StoppedError, TrainingDivergedError, UserError, first_line
from cifar.evaluation import Evaluation, evaluate
from cifar.files import write_json
from cifar.profiler import StepProfiler
from cifar.resume import Resumed, restore
from cifar.run_dir import RunLock, check_unused, check_writable, create_run_dir
from cifar.tracking import Tracking, add_start, parts
from cifar.train_state import LogPoint, TrainState


class Run:
    """One run, new or resumed; a context manager that closes its records, however the training ends.

    Every rank has one and calls the same methods; rank zero writes and prints.

    Attributes:
        config: the configuration, resolved: with the run directory and the global batch size.
        runtime, data: as passed.
        plan: the batch arithmetic.
        state: everything that changes during training.
        first_step: the first step that this process trains.
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
            StoppedError: torchrun has restarted a run that had finished.
        """
        self.runtime, self.data, self.plan = runtime, data, data.plan
        runtime.settle_buckets(model, data.train.dataset.images[:2])
        self.state = TrainState(unwrap(model), optimizer, runtime.scaler)
        self._last_step = self.plan.last_step(config)
        self._facts = self._environment()
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
        self._writer = CheckpointWriter(
            self.dir, config.keep_checkpoints, runtime.print0, resumed.checkpoint if resumed else None
        )
        self._tracking = Tracking(self.config, runtime, self.dir, data, self._facts, self.state.step)
        self._console = Console(config, runtime, data)
        self._console.banner(self.state, str(self.dir), self._tracking.describe(), resumed)
        self._request = StopRequest(runtime.launch, self._cannot_end)
        self._agreement = StopAgreement(runtime, self._request)

    def _open(self, config: TrainConfig) -> Resumed | None:
        """Create or find the run directory, lock it, restore the state, and record the configuration."""
        runtime, state = self.runtime, self.state
        launches = [launch for launch in dict.fromkeys(runtime.gather(runtime.launch_id)) if launch is not None]
        run_dir: Path | None = None
        with runtime.fail_together():
            if runtime.is_main:
                run_dir = config.resume or create_run_dir(config.run_dir, config.recipe)
                self._lock = RunLock(run_dir)
                if config.resume is None:
                    check_unused(run_dir)
        self.dir = runtime.from_main(run_dir)
        resumed = None
        if config.resume is not None:
            own = runtime.from_main(self._lock and self._lock.owned_by(launches))
            resumed = restore(config, runtime, self.data, state, bool(own))
        self.config = dataclasses.replace(
            config, run_dir=self.dir, resume=None, global_batch_size=self.plan.global_batch_size
        )
        with runtime.fail_together():
            if self._lock is not None:
                # Weights, momentum and a checkpoint beside its predecessor, with room for the records.
                parameters = sum(parameter.numel() for parameter in state.model.parameters())
                check_writable(self.dir, need=3 * 8 * parameters + (4 << 20))
                try:
                    # A directory is a run once it has a config.json; from then on, a restart must recognize it.
                    self._lock.record_owner(launches)
                    self._facts["starts"] = add_start(self.dir, self._facts, state.step, runtime.launch.hosts)
                    write_json(self.dir / "config.json", {"config": self.config.to_json(), **self._facts})
                except OSError as error:
                    raise UserError(f"the configuration cannot be written to {self.dir}: {error}") from error
        return resumed

    def __enter__(self) -> "Run":
        self.runtime.end_start()  # W&B may have kept rank zero waiting
        self._request.__enter__()
        self._console.start_bar(self.state)
        if self.config.profile:
            self._profiler = StepProfiler(self.runtime, self.dir)
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
                stack.callback(self._leave_together)
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

    def _leave_together(self) -> None:
        """Wait until rank zero has closed the records, for torchrun ends a host's ranks as soon as one has left.

        With restarts left, torchrun starts them again: right on a host that was not asked to stop, while on another one
        a rank has to ask torchrun, too. SIGTERM to all ranks of a host may be torchrun's own, before a restart.
        """
        launch = self.runtime.launch
        with contextlib.suppress(RuntimeError):  # a rank has been killed meanwhile
            requests = self.runtime.gather((launch.host, self._request.name))
            names = {name for host, name in requests if host == launch.host}
            if launch.restarts_left > 0 and launch.local_rank == 0 and names not in ({None}, {"SIGTERM"}):
                self._request.pass_on()

    def _cannot_end(self) -> bool:
        """Return whether training waits for a process that is gone, and no checkpoint or record is being completed."""
        return self.runtime.peer_is_gone and not self._closing and self._writer.idle

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
        """Print and record training metrics."""
        self._console.log(point)
        test_follows = point.epoch_step == self.plan.steps_per_epoch or self.finished
        self._tracking.log_train(point, test_follows)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of this step in the background. Collective."""
        # Each rank has its own running loss; the checkpoint holds all of them, so that resuming is exact.
        losses = self.runtime.gather(self.state.running_loss.item())
        if self.runtime.is_main:
            self._writer.save({
                "format": FORMAT,
                "config": self.config.to_json(),
                "dataset": self.data.name,
                "classes": list(self.data.classes),
                "state": self.state.state_dict() | {"running_loss": losses},
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

    def stop(self) -> NoReturn:
        """Stop after this step, whose checkpoint has been saved.

        Raises:
            StoppedError: always; its text says how to continue.
        """
        self._writer.flush()
        launch = self.runtime.launch
        requests = self.runtime.gather((launch.host, self._request.name))
        leaving = {host for host, name in requests if name is not None}
        names = sorted({name for _, name in requests if name is not None})
        text = f"Stopped by {', '.join(names)} after step {self.state.step:,} of {self._last_step:,}"
        if launch.restarts_left > 0 and len({host for host, _ in requests} - leaving):
            text += f" on host {', '.join(map(str, sorted(leaving)))}; torchrun restarts the others"
        else:
            text += f"; to continue: --resume {self.dir}"
        number = getattr(signal, names[0], None)  # None: the end of torchrun
        raise StoppedError(text, status=128 + number if number else 1)

    def finish(self) -> None:
        """Print the accuracies of the finished run; write result.json, report.png and index.html. Collective."""
        state, runtime = self.state, self.runtime
        if self._test is None:  # the run was killed after its last step and resumed
            self._test = evaluate(state.model, self.data.test, runtime)
        test, tta_test = self._test, None
        if self.config.tta != "none":
            tta_test = evaluate(state.model, self.data.test, runtime, self.config.tta, test)
        self._console.finish(state)
        print_test(runtime, self.data.name, test, tta_test)
        if not runtime.is_main:
            return
        result = self._result(test) | {"tta": self.config.tta, "test_accuracy_tta": tta_test and tta_test.accuracy}
        self._writer.flush()
        self._tracking.finish(state.step, result, test, checkpoint_path(self.dir, state.best_step))
        try:
            write_json(self.dir / "result.json", result)
        except OSError as error:
            runtime.print0(f"WARNING: result.json cannot be written to {self.dir}: {error}")
            return
        try:
            from cifar.report import write_report  # matplotlib takes a second to import

            write_report(self.dir, test, self.data.test.dataset.images)
        except Exception as error:  # nothing that draws may fail a finished run
            runtime.print0(f"WARNING: no report in {self.dir}: {type(error).__name__}: {first_line(error)}")
        else:
            runtime.print0(f"records, index.html and report.png are in {self.dir}")

    def _environment(self) -> dict[str, Any]:
        """Return what the numbers of a run depend on besides its configuration."""
        return {
            "dataset": self.data.name,
            "images": self.data.fingerprint,
            "decoder": self.data.decoder,
            "world_size": self.runtime.world_size,
            "accumulation": self.plan.accumulation,
            "steps_per_epoch": self.plan.steps_per_epoch,
            "device": self.runtime.device.type,
            "version": cifar.__version__,
            "git_commit": _git_commit() if self.runtime.is_main else None,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
        }

    def _result(self, test: Evaluation) -> dict[str, Any]:
        state = self.state
        trained_on = parts(self._facts, state.step, "world_size", "device")
        accuracies = test.class_accuracies().values()
        return {
            **{name: getattr(self.config, name) for name in ("recipe", "model", "epochs", "seed", "precision")},
            "dataset": self.data.name,
            "steps": state.step,
            "trained_on": ", then ".join(f"{count(size, 'process', 'es')} on {device}" for size, device in trained_on),
            "world_size": self.runtime.world_size,
            "local_batch_size": self.plan.micro_batch_sizes(rank=0)[0],
            "global_batch_size": self.plan.global_batch_size,
            "device": self.runtime.device.type,
            "train_seconds": state.train_seconds,
            "first_step_seconds": state.first_step_seconds,
            "images_per_second": state.step * self.plan.global_batch_size / state.train_seconds,
            "test_loss": test.loss,
            "test_correct": test.correct,
            "test_total": test.total,
            "test_accuracy": test.accuracy,
            "test_class_accuracy": [accuracy if math.isfinite(accuracy) else None for accuracy in accuracies],
            "best_accuracy": state.best_accuracy,
            "best_step": state.best_step,
            "checkpoint_seconds": self._writer.waited_seconds,
        }


def evaluate_checkpoint(config: TrainConfig, model: nn.Module, data: Data, runtime: Runtime) -> None:
    """Print the test accuracy of the checkpoint `config.evaluate`. Collective.

    Raises:
        UserError: the checkpoint is corrupt, or of another model or other classes.
    """
    assert config.evaluate is not None
    content = read_checkpoint(config.evaluate)
    if tuple(content["classes"]) != data.classes:
        theirs, ours = (
            ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
            for classes in (content["classes"], data.classes)
        )
        raise UserError(
            f"{config.evaluate} was trained on the classes of {content['dataset']} ({theirs}), not on those of "
            f"{data.name} here ({ours})"
        )
    load_model(unwrap(model), content, config.model, config.evaluate)
    where = f"{config.evaluate}: {config.model}, trained on {content['dataset']} to step {content['state']['step']:,}"
    runtime.print0(f"{where}; testing on {data.name} in {runtime.precision}")
    test = evaluate(model, data.test, runtime)
    tta_test = evaluate(model, data.test, runtime, config.tta, test) if config.tta != "none" else None
    print_test(runtime, data.name, test, tta_test)


def _git_commit() -> str | None:
    """Return the commit of this source tree, with "-dirty" if files have changed; None if it is not a git checkout."""
    root = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    if not (root / ".git").exists():
        return None
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
