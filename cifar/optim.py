"""The optimizers."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cifar.batch_plan import BatchPlan
from cifar.config import TrainConfig


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


class Muon(torch.optim.Optimizer):
    """Muon for the groups with `orthogonal=True`, SGD with momentum for the others.

    Args:
        params: parameter groups. In an orthogonal one, each parameter [out, ...] is kept at the norm sqrt(out).
        lr, momentum, nesterov, weight_decay: as those of torch.optim.SGD; each may differ between groups.
    """

    def __init__(
        self, params: Any, lr: float, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"orthogonal": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if group["weight_decay"]:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        update = gradient.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
        if group["orthogonal"]:
            # What follows doesn't depend on a filter's scale, so it is held where lr means the same for all.
            parameter.mul_(len(parameter) ** 0.5 / parameter.norm())
            update = orthogonalize(update.flatten(1)).view_as(update)
        parameter.sub_(update * group["lr"])


def orthogonalize(matrix: Tensor, steps: int = 3) -> Tensor:
    """`matrix`, [rows, columns], with its singular values moved towards 1: after 3 steps, most are in 0.5 to 1.5.

    Newton-Schulz iterations of fifth order with Jordan's coefficients, which trade accuracy for speed; in bfloat16 on
    a GPU, where that is enough.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    x = x / (x.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


def base_learning_rate(config: TrainConfig, plan: BatchPlan) -> float:
    """The learning rate for this global batch: linear scaling after Goyal et al. 2017 (arXiv 1706.02677)."""
    if config.lr_scaling == "none":
        return config.lr
    return config.lr * plan.global_batch_size / config.lr_batch_size


def learning_rate(config: TrainConfig, plan: BatchPlan, step: int) -> float:
    """The learning rate of optimizer step `step` (from 0): a function of the step, with no state to save.

    "cosine" is Loshchilov & Hutter 2017 (arXiv 1608.03983) without restarts, "linear" a straight line to zero; the
    warm-up is that of Goyal et al., which large batches need for their scaled rates.
    """
    lr = base_learning_rate(config, plan)
    if config.warmup_epochs:
        lr *= min(1.0, (step + 1) / (config.warmup_epochs * plan.steps_per_epoch))
    if config.schedule == "cosine":
        lr *= (1 + math.cos(math.pi * step / plan.total_steps(config))) / 2
    elif config.schedule == "linear":
        lr *= 1 - step / plan.total_steps(config)
    return lr
