"""The optimizers."""

from typing import Any

import torch
from torch import Tensor, nn

from cifar.config import TrainConfig
from cifar.muon import Muon


def build_optimizer(net: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of the trained parameters of `net`, which it holds by reference: it reads their `.grad`.

    Each group's "lr_scale" is what the schedule's learning rate is multiplied by for it.
    """
    sgd: dict[str, Any] = {
        "lr": config.lr,  # the loop sets each step's own; see batches.learning_rate
        "momentum": config.momentum,
        "nesterov": config.nesterov,
        "weight_decay": config.weight_decay,
    }
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    biases = [parameter for parameter in trained if parameter.ndim == 1 and config.bias_lr_scale != 1]
    filters = [parameter for parameter in trained if parameter.ndim == 4 and config.optimizer == "muon"]
    taken = {id(parameter) for parameter in biases + filters}
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if id(parameter) not in taken], "lr_scale": 1.0},
        {"params": biases, "lr_scale": config.bias_lr_scale},
    ]
    if config.optimizer == "muon":
        muon = {"orthogonal": True, "momentum": config.muon_momentum, "nesterov": True, "weight_decay": 0.0}
        groups.append({"params": filters, "lr_scale": config.muon_lr / config.lr, **muon})
    groups = [group for group in groups if group["params"]]
    # Fused: one kernel updates all parameters, which for a small net is most of what an update costs.
    optimizer = Muon(groups, **sgd) if config.optimizer == "muon" else torch.optim.SGD(groups, **sgd, fused=True)
    if config.momentum and config.optimizer == "sgd":
        # torch would allocate the buffers in the first update, and leave them uninitialized if fp16's loss scaler
        # skips it. From zeros, the first update has the same bits.
        for parameter in trained:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    optimizer.register_load_state_dict_post_hook(_match_layout)
    return optimizer


def _match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give each tensor of the loaded state the memory layout of its parameter.

    torch keeps the checkpoint's strides. The fused update reads parameter, gradient and momentum as flat rows, so
    momentum in another layout would be applied to the wrong elements.
    """
    for parameter, state in optimizer.state.items():
        state.update({name: torch.empty_like(parameter).copy_(value) for name, value in state.items()})


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr`, times each group's scale, from the next update on."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # a captured graph reads it where it is
            group["lr"].fill_(lr * group["lr_scale"])
        else:
            group["lr"] = lr * group["lr_scale"]
