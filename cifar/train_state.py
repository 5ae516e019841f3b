"""The state of a training run, and its metrics at a logging step."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


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
        first_step_seconds: those of `train_seconds` until the end of the first step, in which kernels are loaded,
            chosen and compiled; summed over the processes that have continued the run.
        best_accuracy, best_step: highest test accuracy after an epoch, 0 to 1, and the step of that test.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    running_loss: Tensor = field(init=False)
    running_steps: int = 0
    step: int = 0
    train_seconds: float = 0.0
    first_step_seconds: float = 0.0
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


_NUMBERS = ("running_steps", "step", "train_seconds", "first_step_seconds", "best_accuracy", "best_step")


@dataclass(frozen=True)
class LogPoint:
    """Training metrics at a logging step.

    Attributes:
        step: optimizer steps since the run began.
        epoch: the epoch, counted from 1.
        epoch_step: optimizer steps since the epoch began.
        loss: mean cross-entropy since the last log point, over all ranks.
        lr: learning rate of the last update.
        images_per_second: training throughput of all ranks together since the last log point or checkpoint; a
            process's first includes its first step, and an epoch's first the drawing of its permutation.
    """

    step: int
    epoch: int
    epoch_step: int
    loss: float
    lr: float
    images_per_second: float
