"""The optimizer."""

from collections.abc import Iterable

import torch
from torch import nn

from cifar.config import TrainConfig


def build_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.SGD:
    """SGD with momentum over `parameters`, which it holds by reference: it reads their `.grad` and changes them.

    Fused: one kernel updates all parameters, which for a small net is most of what an update costs.
    """
    return torch.optim.SGD(
        parameters,
        lr=config.lr,  # the loop sets each step's own; see batches.learning_rate
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` from the next update on."""
    for group in optimizer.param_groups:
        group["lr"] = lr
