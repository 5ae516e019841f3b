"""One epoch of training: batches, learning rate, logging, checkpoints."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cifar.data import TrainLoader
from cifar.errors import TrainingDivergedError
from cifar.optim import learning_rate, set_learning_rate

if TYPE_CHECKING:
    from cifar.run import Run


@dataclass
class TrainState:
    """Everything that changes during training; a checkpoint holds all of it.

    Attributes:
        model: the bare module.
        scaler: the loss scaler of fp16.
        running_loss: this rank's losses since the last log point, summed over steps: a float32 scalar on the device.
        running_steps: optimizer steps since the last log point.
        step: optimizer steps since the run began; the plan turns it into an epoch and a position in it.
        train_seconds: seconds of training, without start-up, evaluation and checkpoints.
        best_accuracy, best_step: highest test accuracy after an epoch, 0 to 1, and the step of that test.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    running_loss: Tensor = field(init=False)
    running_steps: int = 0
    step: int = 0
    train_seconds: float = 0.0
    best_accuracy: float = 0.0
    best_step: int = 0

    def __post_init__(self) -> None:
        self.running_loss = torch.zeros((), device=next(self.model.parameters()).device)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors, numbers, strings and containers of them."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "running_loss": self.running_loss.item(),
            **{name: getattr(self, name) for name in _NUMBERS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.running_loss.fill_(state["running_loss"])
        for name in _NUMBERS:
            setattr(self, name, state[name])


_NUMBERS = ("running_steps", "step", "train_seconds", "best_accuracy", "best_step")


@dataclass(frozen=True)
class LogPoint:
    """Training metrics at a logging step.

    Attributes:
        step: optimizer steps since the run began.
        epoch: the epoch, counted from 1.
        epoch_step: optimizer steps since the epoch began.
        loss: mean cross-entropy since the last log point, over all ranks.
        lr: learning rate of the last update.
        images_per_second: training throughput of all ranks together since the last log point or checkpoint.
    """

    step: int
    epoch: int
    epoch_step: int
    loss: float
    lr: float
    images_per_second: float


def train_epoch(
    run: "Run",
    model: nn.Module,
    loader: TrainLoader,
    optimizer: torch.optim.Optimizer,
    train_step: Callable[..., Tensor],
) -> None:
    """Train from `run.state.step` to the end of its epoch, or to `--max-steps`.

    The loss stays on the device between log points: reading it would make the host wait for the device.

    Args:
        train_step: `train_ddp.train_step`, or a `CudaGraph` of it.

    Raises:
        TrainingDivergedError: the mean loss since the last log point is not finite; raised on all ranks.
        StoppedError: some rank was asked to stop; raised on all ranks after the same step.
    """
    config, plan, runtime, state = run.config, run.plan, run.runtime, run.state
    epoch, done = divmod(state.step, plan.steps_per_epoch)
    loader.set_epoch(epoch, first=done * plan.accumulation)
    micro_batches = iter(loader)
    last = min(plan.steps_per_epoch, plan.last_step(config) - epoch * plan.steps_per_epoch)
    model.train()

    began, images = time.perf_counter(), 0
    for epoch_step in range(done + 1, last + 1):
        lr = learning_rate(config, plan, state.step)
        set_learning_rate(optimizer, lr)
        batches = list(islice(micro_batches, plan.accumulation))
        with runtime.convolutions():
            state.running_loss += train_step(model, batches, optimizer, runtime, config.label_smoothing)
        state.running_steps += 1
        state.step += 1
        images += plan.global_batch_size

        # After the last step of an epoch, the checkpoint follows the evaluation, so that resuming never skips that.
        at_end = epoch_step == last
        at_stop = run.after_step() and not at_end
        at_log = epoch_step % config.log_steps == 0 or at_end
        at_checkpoint = config.checkpoint_steps is not None and state.step % config.checkpoint_steps == 0 and not at_end
        if not (at_log or at_checkpoint or at_stop):
            continue
        loss = runtime.mean(state.running_loss / state.running_steps).item()
        if not math.isfinite(loss):
            raise TrainingDivergedError(f"the loss became {loss} at step {state.step}, with lr {lr:g}")
        seconds = time.perf_counter() - began
        state.train_seconds += seconds
        if at_log:
            run.log(LogPoint(state.step, epoch + 1, epoch_step, loss, lr, images / seconds))
            state.running_loss.zero_()
            state.running_steps = 0
        if at_checkpoint or at_stop:
            run.save_checkpoint()
        if at_stop:
            run.stop()
        began, images = time.perf_counter(), 0
