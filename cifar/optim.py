"""SGD, Muon and the learning-rate schedule."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from cifar.batch_plan import BatchPlan
from cifar.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer of the trainable parameters of `model`; it holds these very tensors and reads their `.grad`.

    The learning rate of a parameter group is the schedule's times the group's "lr_scale".
    """
    settings: dict[str, Any] = {
        "lr": config.lr,  # replaced before every step; see learning_rate
        "momentum": config.momentum,
        "nesterov": config.nesterov,
        "weight_decay": config.weight_decay,
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    biases = [parameter for parameter in trained if parameter.ndim == 1 and config.bias_lr_scale != 1]
    filters = [parameter for parameter in trained if parameter.ndim == 4 and config.optimizer == "muon"]
    special = {id(parameter) for parameter in biases + filters}
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if id(parameter) not in special], "lr_scale": 1.0},
        {"params": biases, "lr_scale": config.bias_lr_scale},
    ]
    if config.optimizer == "muon":
        muon = {"orthogonal": True, "momentum": config.muon_momentum, "nesterov": True, "weight_decay": 0.0}
        groups.append({"params": filters, "lr_scale": config.muon_lr / config.lr, **muon})
    groups = [group for group in groups if group["params"]]
    # Fused: one kernel updates all parameters; for a small model, launching kernels is most of the cost of an update.
    sgd_class = Muon if config.optimizer == "muon" else partial(torch.optim.SGD, fused=True)
    optimizer: torch.optim.Optimizer = sgd_class(groups, **settings)
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
    """Set the learning rate of every group to `lr` times the group's "lr_scale"."""
    for group in optimizer.param_groups:
        scaled_lr = lr * group["lr_scale"]
        if isinstance(group["lr"], Tensor):  # read by a captured CUDA graph, so it must stay in place
            group["lr"].fill_(scaled_lr)
        elif group["params"][0].is_cuda:  # rounded to float32 as there: the same bits with a graph and without
            group["lr"] = torch.tensor(scaled_lr, dtype=torch.float32).item()
        else:
            group["lr"] = scaled_lr


def learning_rate(config: TrainConfig, plan: BatchPlan, step: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0: a function, with no state to save.

    "cosine" is Loshchilov & Hutter 2017 (arXiv 1608.03983) without restarts, "linear" a straight line to zero. The
    linear warm-up of Goyal et al. multiplies the schedule: when it ends, a falling schedule is below the base rate.
    """
    lr = plan.base_learning_rate(config)
    if config.warmup_epochs:
        lr *= min(1.0, (step + 1) / (config.warmup_epochs * plan.steps_per_epoch))
    if config.schedule == "cosine":
        lr *= (1 + math.cos(math.pi * step / plan.total_steps(config))) / 2
    elif config.schedule == "linear":
        lr *= 1 - step / plan.total_steps(config)
    return lr


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized updates (K. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    torch.optim.Muon takes matrices only. This one takes convolution filters, in the groups with `orthogonal=True`; the
    other groups are updated by SGD with momentum.

    Args:
        params: parameter groups. In an orthogonal one, each parameter [out, ...] is kept at the norm sqrt(out).
        lr, momentum, nesterov, weight_decay: as in torch.optim.SGD; each may differ between groups.
    """

    def __init__(
        self, params: Any, lr: float, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"orthogonal": False})
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    # fp16's loss scaler sets these before a step, instead of reading found_inf on the host.
    _step_supports_amp_scaling = True
    grad_scale: Tensor | None
    found_inf: Tensor

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, a group at a time: on a GPU, in few kernels.

        Under fp16, `grad_scale` and `found_inf` are the loss scaler's, float32 scalars on the device: if a gradient has
        overflowed, parameters and momentum stay as they are.
        """
        assert closure is None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [parameter.grad for parameter in parameters]
            buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            if (found_inf := getattr(self, "found_inf", None)) is None:
                self._update(parameters, gradients, buffers, group)
                continue
            before = [tensor.clone() for tensor in parameters + buffers]
            if self.grad_scale is not None:
                torch._foreach_mul_(gradients, self.grad_scale.reciprocal())
            self._update(parameters, gradients, buffers, group)
            for tensor, old in zip(parameters + buffers, before, strict=True):
                torch.where(found_inf > 0, old, tensor, out=tensor)  # a product with zero would keep NaN

    @staticmethod
    def _update(
        parameters: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], group: dict[str, Any]
    ) -> None:
        if parameters[0].is_cuda and not group["orthogonal"]:
            settings = {name: group[name] for name in ("lr", "momentum", "nesterov", "weight_decay")}
            sgd(parameters, gradients, [*buffers], fused=True, dampening=0.0, maximize=False, **settings)
            return
        if group["weight_decay"]:
            gradients = [*torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, gradients)
        updates = buffers
        if group["nesterov"]:
            updates = [*torch._foreach_add(gradients, buffers, alpha=group["momentum"])]
        if group["orthogonal"]:
            # BatchNorm makes the output independent of the filter's scale: fix it, so that lr means the same for all.
            norms = torch._foreach_norm(parameters)
            torch._foreach_clamp_min_(norms, 1e-30)  # of a filter of zeros, which stays one until its update
            scales = torch._foreach_reciprocal(norms)
            torch._foreach_mul_(scales, [len(parameter) ** 0.5 for parameter in parameters])
            torch._foreach_mul_(parameters, scales)
            if parameters[0].is_cuda:
                updates = orthogonalize_filters(updates)
            else:
                updates = [orthogonalize(update.flatten(1)).view_as(update) for update in updates]
        torch._foreach_sub_(parameters, torch._foreach_mul(updates, group["lr"]))


_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's; they trade accuracy for speed


def orthogonalize(matrix: Tensor, steps: int = 3) -> Tensor:
    """Return `matrix`, [rows, columns], with singular values moved towards 1: after 3 steps, most are in 0.5 to 1.5.

    Uses fifth-order Newton-Schulz iterations with Jordan's coefficients.
    """
    a, b, c = _COEFFICIENTS
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def orthogonalize_filters(filters: Sequence[Tensor], steps: int = 3) -> list[Tensor]:
    """Return each of `filters`, [out, in, height, width], orthogonalized as [out, in * height * width], channels-last.

    Computed in bfloat16, which is accurate enough. Padded with zeros, which stay zeros, to one size, all matrices go
    through the iterations as one batch: on a GPU, launching small products would take longer than the products.
    """
    a, b, c = _COEFFICIENTS
    # The order of the columns does not matter; in that of channels-last memory, nothing is copied.
    matrices = [filter.permute(0, 2, 3, 1).flatten(1) for filter in filters]
    tall = [matrix.shape[0] > matrix.shape[1] for matrix in matrices]
    wide = [matrix.T if is_turned else matrix for matrix, is_turned in zip(matrices, tall, strict=True)]
    rows, columns = (max(matrix.shape[k] for matrix in wide) for k in (0, 1))
    x = wide[0].new_zeros((len(wide), rows, columns), dtype=torch.bfloat16)
    for padded, matrix in zip(x, wide, strict=True):
        padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    results = []
    for padded, matrix, is_turned, filter in zip(x, wide, tall, filters, strict=True):
        result = padded[: matrix.shape[0], : matrix.shape[1]]
        out, channels, height, width = filter.shape
        result = (result.T if is_turned else result).to(filter.dtype, memory_format=torch.contiguous_format)
        results.append(result.view(out, height, width, channels).permute(0, 3, 1, 2))
    return results
