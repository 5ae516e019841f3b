"""One training step in slow motion: how loss, gradients and optimizer work together, shown on a real batch.

    python -m cifar.explain
    torchrun --nproc_per_node=2 -m cifar.explain

It takes the flags of train_ddp.py and runs its `train_step`; every claim it prints is checked on the numbers first.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cifar.cli import exit_on_error, launch
from cifar.config import TrainConfig
from cifar.data import Data, load_data
from cifar.distributed.runtime import Runtime, unwrap
from cifar.errors import UserError
from cifar.models import build_model
from cifar.optim import build_optimizer, learning_rate, set_learning_rate
from train_ddp import train_step

Gradients = dict[str, Tensor]


class _NoUpdate:
    """Stands in for the optimizer of `train_step`, which then runs forward and backward only, and adds to `.grad`."""

    def zero_grad(self) -> None:
        """Keep the gradients."""

    def step(self) -> None:
        """Keep the parameters."""


def main(argv: Sequence[str] | None = None) -> None:
    """Explain one step on stdout."""
    with launch(argv, prog="python -m cifar.explain") as (config, runtime):
        if config.precision == "fp16":
            raise UserError("fp16 scales the loss and with it the gradients shown here: use fp32 or bf16")
        if config.optimizer != "sgd" or config.bias_lr_scale != 1 or config.label_smoothing:
            raise UserError(f"only plain SGD is explained, not the recipe {config.recipe}: use tutorial or wide")
        data = load_data(config, runtime)
        torch.manual_seed(config.seed)
        net = build_model(config.model, len(data.classes), data.sample)
        model = runtime.prepare(net)
        optimizer = build_optimizer(model, config)
        images, labels = next(iter(data.train))[0]

        def forward_backward() -> Tensor:
            return train_step(model, [(images, labels)], len(images) * runtime.world_size, _NoUpdate(), runtime)  # type: ignore[arg-type]

        explain_forward(net, images, labels, data, runtime)
        if runtime.world_size > 1:
            explain_all_reduce(model, forward_backward, runtime)
        explain_backward(net, forward_backward, len(data.classes), runtime)
        explain_update(net, optimizer, learning_rate(config, data.plan, 0), config, runtime)
        explain_zero_grad(net, forward_backward, runtime)


def explain_forward(net: nn.Module, images: Tensor, labels: Tensor, data: Data, runtime: Runtime) -> None:
    """Show the shapes through the layers."""
    say = runtime.print0
    say(f"FORWARD: a micro-batch of {data.name}, {_shape(images)} in [{images.min():.2f}, {images.max():.2f}]")
    say(f"   labels: {', '.join(data.classes[label] for label in labels[:8])}{', ...' if len(labels) > 8 else ''}")

    def show(name: str) -> Any:
        return lambda module, inputs, output: say(f"   {name:<6} {_shape(inputs[0]):>20} -> {_shape(output)}")

    leaves = [(name, module) for name, module in net.named_modules() if not list(module.children())]
    hooks = [module.register_forward_hook(show(name)) for name, module in leaves]
    with torch.no_grad():
        net(images)
    for hook in hooks:
        hook.remove()


def explain_all_reduce(model: nn.Module, forward_backward: Callable[[], Tensor], runtime: Runtime) -> None:
    """Show that DistributedDataParallel replaces the gradients of all ranks by their mean."""
    net = unwrap(model)
    runtime.print0("\nALL-REDUCE: every rank computes the gradient of its own images")
    with runtime.accelerator.no_sync(model):
        forward_backward()
    own = _gradients(net)
    net.zero_grad()
    forward_backward()
    averaged = _gradients(net)
    net.zero_grad()
    before, after = runtime.gather(_norm(own)), runtime.gather(_norm(averaged))
    runtime.print0(f"   before it, the gradient's norm on each rank: {', '.join(f'{norm:.6f}' for norm in before)}")
    runtime.print0(f"   after it:                                    {', '.join(f'{norm:.6f}' for norm in after)}")
    _check(len(set(before)) == runtime.world_size, "the ranks' own gradients differ")
    _check(len(set(after)) == 1, "the ranks' gradients agree after the all-reduce")
    mean = {name: runtime.mean(gradient) for name, gradient in own.items()}
    _check(_difference(mean, averaged) < 1e-6, "the all-reduce is the mean over the ranks")
    runtime.print0("   they differ before and agree after; what they agree on is the mean over the ranks")


def explain_backward(
    net: nn.Module, forward_backward: Callable[[], Tensor], num_classes: int, runtime: Runtime
) -> None:
    """Show the loss, and the gradients that `backward` stores in `.grad`."""
    _check(all(parameter.grad is None for parameter in net.parameters()), "every .grad is None before backward")
    loss = forward_backward()
    runtime.print0("\nBACKWARD: every .grad is None before it")
    where = " of rank 0's images" if runtime.world_size > 1 else ""
    runtime.print0(
        f"   loss: cross-entropy {loss:.4f}{where} (guessing costs ln {num_classes} = {math.log(num_classes):.4f})"
    )
    for name, gradient in _gradients(net).items():
        runtime.print0(f"   {name + '.grad':<18} {_shape(gradient):>16}  norm {gradient.norm():.6f}")


def explain_update(
    net: nn.Module, optimizer: torch.optim.Optimizer, lr: float, config: TrainConfig, runtime: Runtime
) -> None:
    """Show that the optimizer reads `.grad` and updates the model's own parameters."""
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    _check(held == [id(parameter) for parameter in net.parameters()], "the optimizer holds the parameters themselves")
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    set_learning_rate(optimizer, lr)
    optimizer.step()

    worst = 0.0
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        direction = buffer = optimizer.state[parameter]["momentum_buffer"] if config.momentum else parameter.grad
        if config.nesterov:
            direction = parameter.grad + config.weight_decay * before[name] + config.momentum * buffer
        worst = max(worst, (parameter.detach() - (before[name] - lr * direction)).abs().max().item())
    _check(worst < 1e-6, "the update is p - lr * buffer")
    rule = "p - lr * (grad + weight decay * p + momentum * buffer)" if config.nesterov else "p - lr * buffer"
    runtime.print0("\nUPDATE: the optimizer holds the model's own parameters and reads their .grad")
    runtime.print0(f"   SGD: {rule}, lr {lr:g}; in this first step the buffer is the gradient")
    runtime.print0(f"   the updated parameters differ from that formula by at most {worst:.1e}")


def explain_zero_grad(net: nn.Module, forward_backward: Callable[[], Tensor], runtime: Runtime) -> None:
    """Show why gradients are zeroed: `backward` adds to `.grad`."""
    stale = _gradients(net)
    forward_backward()
    added = _gradients(net)
    net.zero_grad()
    forward_backward()
    fresh = _gradients(net)
    total = {name: stale[name] + fresh[name] for name in fresh}
    _check(_difference(added, total) < 1e-5, "backward adds to .grad")
    runtime.print0("\nZERO_GRAD: a second backward, after the update and without zeroing, would have added to .grad:")
    runtime.print0(f"   norm {_norm(added):.6f}, the step's {_norm(stale):.6f} and the new {_norm(fresh):.6f} added up")
    runtime.print0(f"   with zero_grad in between it is the new gradient alone: norm {_norm(fresh):.6f}")


def _gradients(net: nn.Module) -> Gradients:
    return {name: p.grad.detach().clone() for name, p in net.named_parameters() if p.grad is not None}


def _norm(gradients: Gradients) -> float:
    return torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()


def _difference(a: Gradients, b: Gradients) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in b)


def _shape(tensor: Tensor) -> str:
    return f"{list(tensor.shape)}"


def _check(holds: bool, claim: str) -> None:
    if not holds:
        raise RuntimeError(f"this should hold and does not: {claim}")


if __name__ == "__main__":
    with exit_on_error("cifar.explain"):
        main()
