"""One training step, slowly: how loss, gradients and optimizer hang together, shown on a real batch.

    python -m cifar.explain
    torchrun --nproc_per_node=2 -m cifar.explain

It takes the flags of train_ddp.py and runs the same parts; every claim it prints has been checked on the numbers.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cifar.batch_plan import BatchPlan, learning_rate
from cifar.config import TrainConfig, parse_args
from cifar.data import TrainLoader, load_data
from cifar.datasets import CLASSES
from cifar.errors import UserError
from cifar.loop import forward_backward
from cifar.models import build_model
from cifar.optim import build_optimizer, set_learning_rate
from cifar.distributed.runtime import Runtime
from cifar.cli import exit_on_error

Gradients = dict[str, Tensor]


def main(argv: Sequence[str] | None = None) -> None:
    """Explain one step to standard output."""
    config = parse_args(argv, prog="python -m cifar.explain")
    if config.precision == "fp16":
        raise UserError("fp16 scales the loss, so that gradients don't look like themselves: use fp32 or bf16")
    if config.optimizer != "sgd" or config.bias_lr_scale != 1 or config.label_smoothing:
        raise UserError(f"what is explained here is plain SGD, not the recipe {config.recipe}: use tutorial or wide")
    runtime = Runtime(config)
    data = load_data(config, runtime)
    plan = BatchPlan.make(config, runtime.world_size, len(data.train))
    loader = TrainLoader(data.train, plan, runtime.rank, config.seed)
    torch.manual_seed(config.seed)
    net = build_model(config.model)
    model = runtime.wrap(net)
    optimizer = build_optimizer(net, config)
    images, labels = next(iter(loader))

    explain_forward(net, images, labels, data.name, runtime)
    if runtime.world_size > 1:
        explain_all_reduce(model, net, images, labels, runtime)
    explain_backward(model, net, images, labels, runtime)
    explain_update(net, optimizer, learning_rate(config, plan, 0), config, runtime)
    explain_zero_grad(model, net, images, labels, runtime)
    runtime.close()


def explain_forward(net: nn.Module, images: Tensor, labels: Tensor, dataset: str, runtime: Runtime) -> None:
    """The shapes through the layers."""
    say = runtime.print0
    say(f"FORWARD: a micro-batch of {dataset}, {_shape(images)} in [{images.min():.2f}, {images.max():.2f}]")
    say(f"   labels: {', '.join(CLASSES[label] for label in labels[:8])}{', ...' if len(labels) > 8 else ''}")

    def show(name: str) -> Any:
        return lambda module, inputs, output: say(f"   {name:<6} {_shape(inputs[0]):>20} -> {_shape(output)}")

    leaves = [(name, module) for name, module in net.named_modules() if not list(module.children())]
    hooks = [module.register_forward_hook(show(name)) for name, module in leaves]
    with torch.no_grad():
        net(images)
    for hook in hooks:
        hook.remove()


def explain_all_reduce(model: nn.Module, net: nn.Module, images: Tensor, labels: Tensor, runtime: Runtime) -> None:
    """What DistributedDataParallel adds: gradients that differ between ranks become their mean on all of them."""
    runtime.print0("\nALL-REDUCE: every rank computes the gradient of its own images")
    with runtime.accelerator.no_sync(model):
        forward_backward(model, images, labels, runtime.scaler, 1.0)
    own = _gradients(net)
    net.zero_grad()
    forward_backward(model, images, labels, runtime.scaler, 1.0)
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


def explain_backward(model: nn.Module, net: nn.Module, images: Tensor, labels: Tensor, runtime: Runtime) -> None:
    """The loss, and what `backward` leaves in `.grad`."""
    _check(all(parameter.grad is None for parameter in net.parameters()), "every .grad is None before backward")
    loss = forward_backward(model, images, labels, runtime.scaler, 1.0)
    runtime.print0("\nBACKWARD: every .grad is None before it")
    where = " of rank 0's images" if runtime.world_size > 1 else ""
    runtime.print0(
        f"   loss: cross-entropy {loss:.4f}{where} (guessing costs ln {len(CLASSES)} = {math.log(len(CLASSES)):.4f})"
    )
    for name, gradient in _gradients(net).items():
        runtime.print0(f"   {name + '.grad':<18} {_shape(gradient):>16}  norm {gradient.norm():.6f}")


def explain_update(
    net: nn.Module, optimizer: torch.optim.Optimizer, lr: float, config: TrainConfig, runtime: Runtime
) -> None:
    """The optimizer reads `.grad` and moves the parameters, which it shares with the net."""
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
    runtime.print0("\nUPDATE: the optimizer holds the net's own parameters and reads their .grad")
    runtime.print0(f"   SGD: {rule}, lr {lr:g}; in this first step the buffer is the gradient")
    runtime.print0(f"   the parameters that it left differ from that formula by at most {worst:.1e}")


def explain_zero_grad(model: nn.Module, net: nn.Module, images: Tensor, labels: Tensor, runtime: Runtime) -> None:
    """Why gradients are zeroed: `backward` adds to `.grad`."""
    stale = _gradients(net)
    forward_backward(model, images, labels, runtime.scaler, 1.0)
    added = _gradients(net)
    net.zero_grad()
    forward_backward(model, images, labels, runtime.scaler, 1.0)
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
