"""Muon: momentum whose update of a matrix is made orthogonal (K. Jordan et al. 2024).

https://kellerjordan.github.io/posts/muon
torch.optim.Muon takes matrices only; this one takes the filters of convolutions, and SGD's parameters beside them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
