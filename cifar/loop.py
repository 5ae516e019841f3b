"""One epoch of training: batches, learning rate, logging, checkpoints."""

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from cifar.data import TrainLoader
from cifar.errors import LocalError, TrainingDivergedError, out_of_memory
from cifar.optim import learning_rate, set_learning_rate
from cifar.records.metrics import LogPoint
from cifar.run import Run

MicroBatches = list[tuple[Tensor, Tensor]]
TrainStep = Callable[..., Tensor]
"""`train_ddp.train_step`, or a `CudaGraph` of it."""


def train_epoch(
    run: Run, model: nn.Module, loader: TrainLoader, optimizer: torch.optim.Optimizer, train_step: TrainStep
) -> None:
    """Train from `run.state.step` to the end of its epoch, or to `--max-steps`.

    The loss stays on the device between log points: reading it would make the host wait for the device.

    Raises:
        LocalError: the memory of this rank's device or host does not suffice.
        TrainingDivergedError: the mean loss since the last log point is not finite; raised on all ranks.
        StoppedError: some rank was asked to stop; raised on all ranks after the same step.
    """
    config, plan, state = run.config, run.plan, run.state
    interval = _Interval(run)  # begins before the epoch's random numbers are drawn, which is part of training
    epoch, done = divmod(state.step, plan.steps_per_epoch)
    loader.set_epoch(epoch, first=done)
    steps = iter(loader)
    last = min(plan.steps_per_epoch, plan.last_step(config) - epoch * plan.steps_per_epoch)
    model.train()
    for epoch_step in range(done + 1, last + 1):
        lr = learning_rate(config, plan, state.step)
        set_learning_rate(optimizer, lr)
        _train_on(steps, run, model, optimizer, train_step)
        if state.step == run.first_step:
            state.running_loss.item()  # wait for the device, once in a process
            state.first_step_seconds += interval.seconds
        # After the last step of an epoch, the checkpoint follows the evaluation: resuming never skips an evaluation.
        at_end = epoch_step == last
        at_stop = run.after_step() and not at_end
        at_log = epoch_step % config.log_steps == 0 or at_end
        at_checkpoint = config.checkpoint_steps is not None and state.step % config.checkpoint_steps == 0 and not at_end
        if at_log or at_checkpoint or at_stop:
            loss, images_per_second = interval.end(lr)
            if at_log:
                run.log(LogPoint(state.step, epoch + 1, epoch_step, loss, lr, images_per_second))
            if at_checkpoint or at_stop:
                run.save_checkpoint()
            if at_stop:
                run.stop()
            interval = _Interval(run)


class _Interval:
    """Measure the steps from now to the next log point or checkpoint."""

    def __init__(self, run: Run) -> None:
        self._run, self._steps_before, self._began = run, run.state.step, time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def end(self, lr: float) -> tuple[float, float]:
        """Return the mean loss since the last log point and images/s; count the seconds as training. Collective."""
        state = self._run.state
        loss = self._run.runtime.mean(state.running_loss / state.running_steps).item()
        if not math.isfinite(loss):
            raise TrainingDivergedError(f"the loss became {loss} at step {state.step}, with lr {lr:g}")
        seconds = self.seconds
        state.train_seconds += seconds
        return loss, (state.step - self._steps_before) * self._run.plan.global_batch_size / seconds


def _train_on(
    steps: Iterator[MicroBatches], run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, train_step: TrainStep
) -> None:
    """Train on the micro-batches of the next step, and add its loss to the running one."""
    config, plan, runtime, state = run.config, run.plan, run.runtime, run.state
    try:
        batches = next(steps)
        runtime.seed_layers(run.layer_seed + state.step)
        with runtime.convolutions():
            state.running_loss += train_step(
                model, batches, plan.global_batch_size, optimizer, runtime, config.label_smoothing
            )
    except RuntimeError as error:
        if (lack := out_of_memory(error)) is None:
            raise
        raise LocalError(f"{lack} at {plan.advise_on_memory()}") from error
    state.running_steps += 1
    state.step += 1
