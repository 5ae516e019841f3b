"""One epoch of training: micro-batches, accumulation, precision, the update."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar.batch_plan import BatchPlan, learning_rate
from cifar.config import TrainConfig
from cifar.data import TrainLoader
from cifar.errors import TrainingDivergedError
from cifar.optim import set_learning_rate
from cifar.distributed.runtime import Runtime


@dataclass
class TrainState:
    """All that changes during training, and so all that a checkpoint holds.

    Attributes:
        net: the bare module.
        step: optimizer steps done since the run began; with the plan it gives the epoch and the place in it.
        window_loss: sum of the micro-batch losses of this rank since the last log point, float32 on the device.
        window_steps: optimizer steps since the last log point.
        train_seconds: seconds spent training, without evaluation, checkpoints and start-up.
        best_accuracy: highest test accuracy at an epoch's end so far, and `best_step` the step it was reached at.
    """

    net: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    window_loss: Tensor = field(init=False)
    window_steps: int = 0
    step: int = 0
    train_seconds: float = 0.0
    best_accuracy: float = 0.0
    best_step: int = 0

    def __post_init__(self) -> None:
        self.window_loss = torch.zeros((), device=next(self.net.parameters()).device)

    def count_step(self) -> None:
        """Note that an optimizer step has been done."""
        self.step += 1
        self.window_steps += 1

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes: tensors, numbers, strings and containers of them only."""
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "window_loss": self.window_loss.item(),
            "window_steps": self.window_steps,
            "step": self.step,
            "train_seconds": self.train_seconds,
            "best_accuracy": self.best_accuracy,
            "best_step": self.best_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become what `state_dict` described."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.window_loss.fill_(state["window_loss"])
        for name in ("window_steps", "step", "train_seconds", "best_accuracy", "best_step"):
            setattr(self, name, state[name])


@dataclass(frozen=True)
class LogPoint:
    """What is read back from the device now and then.

    Attributes:
        step: optimizer steps done.
        epoch: the epoch, from 1.
        batch: optimizer steps done in this epoch.
        loss: mean cross-entropy of all images since the last log point, over all ranks.
        lr: learning rate of the last update.
        images_per_second: of all ranks together, since the last log point.
    """

    step: int
    epoch: int
    batch: int
    loss: float
    lr: float
    images_per_second: float


class Observer(Protocol):
    """What `train_epoch` tells of its progress; every rank's is called after the same steps."""

    def on_step(self) -> bool:
        """After every step; True, on all ranks after the same step, if the run has to stop."""

    def on_log(self, point: LogPoint) -> None:
        """At log points: every `log_steps` steps of an epoch, and at its end."""

    def save(self) -> None:
        """Every `checkpoint_steps` steps, and before a stop, within an epoch: its end is the caller's to save."""

    def stop(self) -> NoReturn:
        """After a step within an epoch at which the run has to stop."""


def forward_backward(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    scaler: torch.amp.GradScaler,
    share: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """One micro-batch: forward, loss, backward. Gradients are added to what `.grad` already holds.

    Args:
        images: float32 [batch, 3, 32, 32]; labels: int64 [batch]; both on the model's device.
        share: this micro-batch's part of the rank's share of the global batch, 1 / accumulation.
        label_smoothing: share of the target probability that is spread over all classes (arXiv 1512.00567).

    Returns:
        The mean cross-entropy of the micro-batch, a detached scalar on the device.
    """
    loss = F.cross_entropy(model(images), labels, label_smoothing=label_smoothing)
    scaler.scale(loss * share).backward()
    return loss.detach()


def train_step(
    model: nn.Module,
    micro_batches: Iterator[Any],
    state: TrainState,
    config: TrainConfig,
    plan: BatchPlan,
    runtime: Runtime,
) -> None:
    """One optimizer step over a global batch, of which this rank sees `plan.accumulation` micro-batches.

    DistributedDataParallel averages the gradients over the ranks during the last `backward`, and only then.
    """
    state.optimizer.zero_grad()  # backward adds to .grad: without this, the last step's gradients would stay in
    for k in range(1, plan.accumulation + 1):
        images, labels = next(micro_batches)
        with nullcontext() if k == plan.accumulation else runtime.accelerator.no_sync(model):
            state.window_loss += forward_backward(
                model, images, labels, state.scaler, 1 / plan.accumulation, config.label_smoothing
            )
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.count_step()


def train_epoch(
    model: nn.Module,
    loader: TrainLoader,
    state: TrainState,
    config: TrainConfig,
    plan: BatchPlan,
    runtime: Runtime,
    run: Observer,
    step: Callable[..., None] = train_step,
) -> None:
    """Train from `state.step` to the end of its epoch, or to `--max-steps`.

    `step` is `train_step` or what stands for it.

    The loss stays on the device between log points: reading it back would make the host wait for the device.

    Raises:
        TrainingDivergedError: the mean loss since the last log point isn't finite; on all ranks alike.
    """
    epoch, batch = divmod(state.step, plan.steps_per_epoch)
    loader.set_epoch(epoch, first=batch * plan.accumulation)
    micro_batches = iter(loader)
    last = min(plan.steps_per_epoch, plan.last_step(config) - epoch * plan.steps_per_epoch)
    model.train()

    began, images = time.perf_counter(), 0
    while batch < last:
        lr = learning_rate(config, plan, state.step)
        set_learning_rate(state.optimizer, lr)
        with runtime.convolutions():
            step(model, micro_batches, state, config, plan, runtime)
        batch += 1
        images += plan.global_batch_size

        # What comes with the epoch's end is saved after its evaluation, so that resuming never skips that.
        at_stop = run.on_step() and batch < last
        at_log = batch % config.log_steps == 0 or batch == last
        every = config.checkpoint_steps
        at_save = at_stop or (every is not None and state.step % every == 0 and batch < last)
        if at_log or at_save:
            loss = runtime.mean(state.window_loss / (state.window_steps * plan.accumulation)).item()
            if not math.isfinite(loss):
                raise TrainingDivergedError(f"the loss became {loss} at step {state.step}, with lr {lr:g}")
            now = time.perf_counter()
            state.train_seconds += now - began
            if at_log:
                run.on_log(LogPoint(state.step, epoch + 1, batch, loss, lr, images / (now - began)))
                state.window_loss.zero_()
                state.window_steps = 0
            if at_save:
                run.save()
            if at_stop:
                run.stop()
            began, images = time.perf_counter(), 0
