"""One training step in slow motion: how loss, gradients and optimizer work together, shown on a real batch.

    python -m cifar.explain
    torchrun --nproc_per_node=2 -m cifar.explain

It runs the `train_step` of train_ddp.py with the tutorial's recipe, and checks every claim on the numbers before it
prints it.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar.cli import launch
from cifar.command import exit_on_error
from cifar.config import Recipe
from cifar.data import load_data
from cifar.distributed.runtime import Runtime
from cifar.errors import UserError
from cifar.models import build_model
from cifar.optim import build_optimizer, learning_rate, set_learning_rate
from train_ddp import train_step

Tensors = dict[str, Tensor]  # by the name of the parameter


def main(argv: Sequence[str] | None = None) -> None:
    """Explain one step on stdout."""
    with launch(argv, prog="python -m cifar.explain") as (config, runtime):
        if any(getattr(config, name) != value for name, value in vars(Recipe()).items()):
            raise UserError("only the tutorial's recipe is explained: leave out --recipe and the flags that change it")
        data = load_data(config, runtime)
        torch.manual_seed(config.seed)
        net = build_model(config.model, len(data.classes), data.sample)
        model = runtime.prepare(net)
        optimizer = build_optimizer(model, config)
        lr = learning_rate(config, data.plan, 0)
        set_learning_rate(optimizer, lr)
        images, labels = next(iter(data.train))[0]
        runtime.print0(f"FORWARD: a micro-batch of {data.name}")
        explain_forward(net, images, runtime)

        _check(all(parameter.grad is None for parameter in net.parameters()), "every .grad is None before backward")
        with runtime.accelerator.no_sync(model):
            F.cross_entropy(model(images), labels).backward()
        gradients_of_rank = _gradients(net)
        before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        loss = train_step(model, [(images, labels)], len(images) * runtime.world_size, optimizer, runtime)
        runtime.print0("\nBACKWARD: every .grad is None before it")
        mean, guessing = runtime.mean(loss), math.log(len(data.classes))
        runtime.print0(f"   loss: cross-entropy {mean:.4f} (guessing costs {guessing:.4f})")
        explain_gradients(gradients_of_rank, _gradients(net), runtime)
        explain_update(net, optimizer, before, lr, runtime)

        stale = _gradients(net)
        F.cross_entropy(model(images), labels).backward()
        added = _gradients(net)
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        explain_zero_grad(stale, added, _gradients(net), runtime)


def explain_forward(net: nn.Module, images: Tensor, runtime: Runtime) -> None:
    """Show the shapes through the layers."""
    runtime.print0(f"   images {list(images.shape)} in [{images.min():.2f}, {images.max():.2f}]")

    def show(name: str) -> Any:
        return lambda _, inputs, output: runtime.print0(
            f"   {name:<6} {list(inputs[0].shape)!s:>20} -> {list(output.shape)}"
        )

    layers = [(name, module) for name, module in net.named_modules() if not list(module.children())]
    hooks = [module.register_forward_hook(show(name)) for name, module in layers]
    with torch.no_grad():
        net(images)
    for hook in hooks:
        hook.remove()


def explain_gradients(of_rank: Tensors, averaged: Tensors, runtime: Runtime) -> None:
    """Show the gradients, and that DistributedDataParallel has replaced those of all ranks by their mean."""
    for name, gradient in averaged.items():
        runtime.print0(f"   {name + '.grad':<18} {list(gradient.shape)!s:>16}  norm {gradient.norm():.6f}")
    if runtime.world_size == 1:
        return
    before, after = runtime.gather(_norm(of_rank)), runtime.gather(_norm(averaged))
    _check(len(set(before)) == runtime.world_size, "the ranks' own gradients differ")
    _check(len(set(after)) == 1, "the ranks' gradients agree after the all-reduce")
    mean = {name: runtime.mean(gradient) for name, gradient in of_rank.items()}
    _check(_difference(mean, averaged) < 1e-6, "the all-reduce is the mean over the ranks")
    runtime.print0("\nALL-REDUCE: every rank computes the gradient of its own images")
    runtime.print0(f"   before it, the gradient's norm on each rank: {', '.join(f'{norm:.6f}' for norm in before)}")
    runtime.print0(f"   after it:                                    {', '.join(f'{norm:.6f}' for norm in after)}")
    runtime.print0("   they differ before and agree after; what they agree on is the mean over the ranks")


def explain_update(
    net: nn.Module, optimizer: torch.optim.Optimizer, before: Tensors, lr: float, runtime: Runtime
) -> None:
    """Show that the optimizer has read `.grad` and updated the model's own parameters."""
    pairs = zip(optimizer.param_groups[0]["params"], net.parameters(), strict=True)
    _check(all(held is parameter for held, parameter in pairs), "the optimizer holds the parameters themselves")
    updated = {name: parameter.detach() for name, parameter in net.named_parameters()}
    formula = {name: before[name] - lr * gradient for name, gradient in _gradients(net).items()}
    difference = _difference(updated, formula)
    _check(difference < 1e-6, "the update is p - lr * buffer")
    runtime.print0("\nUPDATE: the optimizer holds the model's own parameters and reads their .grad")
    runtime.print0(f"   SGD: p - lr * buffer, lr {lr:g}; in this first step the buffer is the gradient")
    runtime.print0(f"   the updated parameters differ from that formula by at most {difference:.1e}")


def explain_zero_grad(stale: Tensors, added: Tensors, fresh: Tensors, runtime: Runtime) -> None:
    """Show why gradients are zeroed: `backward` adds to `.grad`."""
    _check(_difference(added, {name: stale[name] + fresh[name] for name in fresh}) < 1e-5, "backward adds to .grad")
    runtime.print0("\nZERO_GRAD: a second backward, after the update and without zeroing, would have added to .grad:")
    runtime.print0(f"   norm {_norm(added):.6f}, the step's {_norm(stale):.6f} and the new {_norm(fresh):.6f} added up")
    runtime.print0(f"   with zero_grad in between it is the new gradient alone: norm {_norm(fresh):.6f}")


def _gradients(net: nn.Module) -> Tensors:
    return {name: p.grad.detach().clone() for name, p in net.named_parameters() if p.grad is not None}


def _norm(gradients: Tensors) -> float:
    return torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()


def _difference(a: Tensors, b: Tensors) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in b)


def _check(holds: bool, claim: str) -> None:
    if not holds:
        raise RuntimeError(f"this should hold and does not: {claim}")


if __name__ == "__main__":
    with exit_on_error("cifar.explain"):
        main()
