"""Predict seconds per epoch and efficiency on 1 to 1,024 GPUs from one GPU's step.

    python -m tests.benchmarks.scale                                                # speed94 in bf16, as on an H100
    python -m tests.benchmarks.scale --launches 490 --step-ms 9.09                  # with Muon's filters one by one
    python -m tests.benchmarks.scale --launches 0 --host-ms 0.18                    # captured as a CUDA graph
    python -m tests.benchmarks.scale --model resnet18 --launches 404 --step-ms 5.38 --batch 128

README.md has the model: a ring all-reduce (Patarasu & Yuan 2009; Thakur, Rabenseifner & Gropp 2005) follows the kernels
of a step, or the host's launches if those take longer. Weak scaling keeps the batch of each GPU, strong scaling the
global batch.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from cifar.command import safe_output
from cifar.models import MODELS, build_model

IMAGES = 50_000
COUNTS = tuple(2**k for k in range(11))


class Link(NamedTuple):
    """A link between neighbors in the ring."""

    name: str
    alpha: float  # seconds per message
    bandwidth: float  # bytes per second


# Bandwidths are nominal, per direction (NVLink 4: 18 links of 25 GB/s). Latencies are assumptions, of the usual order
# for a message between two GPUs, between two hosts with RDMA, and between two hosts over TCP.
LINKS = (Link("NVLink", 3e-6, 450e9), Link("100 Gbit/s", 10e-6, 12.5e9), Link("1 Gbit/s", 50e-6, 0.125e9))


def all_reduce_seconds(processes: int, size: float, link: Link) -> float:
    """Return the seconds of a ring all-reduce of `size` bytes."""
    return 2 * (processes - 1) * (link.alpha + size / (processes * link.bandwidth))


class Measured(NamedTuple):
    """A step on one H100, without capture or compilation: kernels, their milliseconds, and those of the whole step."""

    kernels: int
    busy_ms: float
    step_ms: float


# From tests/gpu/README.md: speed94, speed96 and resnet18 in bf16, the others in fp32. When net-fast and speed96 were
# measured, Muon took the filters one by one. speed94 had 259 kernels, and has 250 since (counted on an H200).
H100 = {
    "tutorial": Measured(53, 0.17, 1.640),
    "net-fast": Measured(193, 0.54, 3.650),
    "wide": Measured(74, 0.50, 2.200),
    "resnet18": Measured(404, 5.38, 8.588),
    "speed94": Measured(250, 8.91, 9.093),
    "speed96": Measured(700, 12.12, 12.875),
}


def launch_cost() -> tuple[float, float]:
    """Return the host's milliseconds per step and per launch, fitted to the recipes in which the GPU waits for it.

    Uses the least squares of relative errors, so that small values count as much as large ones.
    """
    bound = [recipe for recipe in H100.values() if recipe.step_ms > 1.2 * recipe.busy_ms]
    steps = torch.tensor([recipe.step_ms for recipe in bound], dtype=torch.float64)[:, None]
    terms = torch.tensor([(1, recipe.kernels) for recipe in bound], dtype=torch.float64)
    per_step, per_launch = torch.linalg.lstsq(terms / steps, torch.ones_like(steps)).solution.flatten().tolist()
    return per_step, per_launch


class Step(NamedTuple):
    """One GPU's step: seconds of its kernels, seconds in which the host launches them, and images."""

    device: float
    host: float
    batch: int


def predict(one: Step, size: float, link: Link, processes: int, strong: bool) -> tuple[float, float]:
    """Return seconds per epoch and efficiency: with an efficiency of 1, p processes are p times as fast as one.

    Args:
        size: bytes of the gradients.
        strong: divide the images among the processes, instead of giving as many to each of them.
    """
    device = one.device / processes if strong else one.device
    step = max(device, one.host) + all_reduce_seconds(processes, size, link)
    global_batch = one.batch if strong else one.batch * processes
    speedup = max(one.device, one.host) / one.batch / (step / global_batch)
    return step * IMAGES / global_batch, speedup / processes


def gradient_bytes(model: str) -> int:
    """Return the bytes of the fp32 gradients of `model` with 10 classes."""
    return 4 * sum(parameter.numel() for parameter in build_model(model, 10).parameters() if parameter.requires_grad)


def table(one: Step, size: float, strong: bool) -> Iterator[str]:
    """Yield the lines of a Markdown table: seconds per epoch and efficiency, by the number of GPUs."""
    heads = [f"{link.name}: epoch | efficiency" for link in LINKS]
    yield f"| GPUs | {' | '.join(heads)} |"
    yield "| --- |" + " --- | --- |" * len(LINKS)
    for count in COUNTS:
        points = [predict(one, size, link, count, strong) for link in LINKS]
        cells = [f"{seconds:.3g} s | {100 * efficiency:.0f} %" for seconds, efficiency in points]
        yield f"| {count:,} | {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        prog="tests.benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default, (host_ms, launch_ms) = H100["speed94"], launch_cost()
    add = parser.add_argument
    add("--step-ms", type=float, default=default.busy_ms, help="one GPU's kernels in a step (default: %(default)g)")
    add("--batch", type=int, default=2000, help="images of that step (default: %(default)s)")
    add("--launches", type=int, default=default.kernels, help="kernels of a step (default: %(default)s)")
    add("--launch-us", type=float, default=1000 * launch_ms, help="the host's time for each (default: %(default).3g)")
    add("--host-ms", type=float, default=host_ms, help="the host's time for the rest (default: %(default).2g)")
    add("--model", choices=MODELS, default="speed", help="default: %(default)s, the model of speed94")
    args = parser.parse_args(argv)
    host = args.host_ms + args.launches * args.launch_us / 1000
    one, size = Step(args.step_ms / 1000, host / 1000, args.batch), gradient_bytes(args.model)
    print(
        f"{args.model}, {args.batch:,} images: {args.step_ms:.4g} ms of kernels; on the host {args.host_ms:.2f} ms + "
        f"{args.launches} launches x {args.launch_us:.1f} us = {host:.2f} ms; {size / 1e6:.2f} MB of gradients"
    )
    print(f"\nweak scaling: {one.batch:,} images a GPU\n")
    print("\n".join(table(one, size, strong=False)))
    print(f"\nstrong scaling: {one.batch:,} images together\n")
    print("\n".join(table(one, size, strong=True)))


if __name__ == "__main__":
    with safe_output():  # `| head` closes the pipe
        main()
