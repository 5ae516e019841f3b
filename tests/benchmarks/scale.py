"""Predict seconds per epoch and efficiency on 1 to 1,024 GPUs from one GPU's step.

    python -m tests.benchmarks.scale                                  # speed94, from its published step on an A100
    python -m tests.benchmarks.scale --model resnet18 --step-ms 40 --batch 512

A ring all-reduce of n bytes among p processes sends 2 (p - 1) messages of n / p bytes, one after the other
(Patarasu & Yuan 2009; Thakur, Rabenseifner & Gropp 2005). With `alpha` seconds per message and a link of
`bandwidth` bytes per second,

    step(p) = compute(p) + 2 (p - 1) (alpha + n / (p * bandwidth))

This is an upper bound: it assumes no overlap, while DDP hides all but the last bucket behind the backward pass. Weak
scaling keeps the batch of each GPU, strong scaling the global batch. Strong scaling divides the compute by p, as if
GPUs were as efficient with few images as with many, which they are not.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cifar.models import MODELS, build_model

IMAGES = 50_000
COUNTS = tuple(2**k for k in range(11))


@dataclass(frozen=True)
class Link:
    """A link between neighbors in the ring: seconds per message, and bytes per second."""

    name: str
    alpha: float
    bandwidth: float


# Bandwidths are nominal, per direction (NVLink 4: 18 links of 25 GB/s). Latencies are assumptions, of the usual order
# for a message between two GPUs, between two hosts with RDMA, and between two hosts over TCP.
LINKS = (Link("NVLink", 3e-6, 450e9), Link("100 Gbit/s", 10e-6, 12.5e9), Link("1 Gbit/s", 50e-6, 0.125e9))


def all_reduce_seconds(processes: int, size: float, link: Link) -> float:
    """Return the seconds of a ring all-reduce of `size` bytes."""
    return 2 * (processes - 1) * (link.alpha + size / (processes * link.bandwidth))


@dataclass(frozen=True)
class Prediction:
    """The speed of several GPUs; efficiency is relative to as many GPUs that do not communicate."""

    step_seconds: float
    epoch_seconds: float
    efficiency: float


def predict(compute: float, batch: int, size: float, link: Link, processes: int, strong: bool) -> Prediction:
    """Apply the model above.

    Args:
        compute: seconds of one GPU's step on `batch` images.
        size: bytes of the gradients.
        strong: divide the batch among the processes, instead of giving each of them `batch` images.
    """
    compute = compute / processes if strong else compute
    step = compute + all_reduce_seconds(processes, size, link)
    global_batch = batch if strong else batch * processes
    return Prediction(step, step * IMAGES / global_batch, compute / step)


def gradient_bytes(model: str) -> int:
    """Return the bytes of the fp32 gradients of `model` with 10 classes."""
    return 4 * sum(parameter.numel() for parameter in build_model(model, 10).parameters() if parameter.requires_grad)


def table(compute: float, batch: int, size: float) -> list[str]:
    """Return the predictions as two Markdown tables of seconds per epoch and efficiency."""
    lines = []
    for strong in (False, True):
        kind = f"strong scaling: {batch:,} images together" if strong else f"weak scaling: {batch:,} images a GPU"
        lines += ["", f"| GPUs, {kind} | " + " | ".join(link.name for link in LINKS) + " |", "| --- |" + " --- |" * 3]
        for count in COUNTS:
            points = [predict(compute, batch, size, link, count, strong) for link in LINKS]
            cells = [f"{point.epoch_seconds:.3g} s, {100 * point.efficiency:.0f} %" for point in points]
            lines.append(f"| {count:,} | " + " | ".join(cells) + " |")
    return lines[1:]


def draw(path: Path, compute: float, batch: int, size: float, title: str) -> None:
    """Plot efficiency over the number of GPUs, weak scaling on the left, strong scaling on the right."""
    from cifar.plotting import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, strong in zip(panels, (False, True), strict=True):
        for link, color in zip(LINKS, ("#1a7f5a", "#1f6fb4", "#d9541e"), strict=True):
            efficiency = [100 * predict(compute, batch, size, link, n, strong).efficiency for n in COUNTS]
            axes.plot(COUNTS, efficiency, "o-", color=color, label=link.name, markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_xticks(COUNTS, [f"{n:,}" for n in COUNTS])
        axes.set(xlabel="GPUs", ylim=(0, 103))
        axes.set_title(f"{batch:,} images " + ("together" if strong else "a GPU"), loc="left", fontweight="bold")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("efficiency, %")
    panels[1].legend(frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables, and draw them if asked to."""
    parser = argparse.ArgumentParser(
        prog="tests.benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # K. Jordan's airbench94_muon: 8 epochs of 25 steps in 2.59 s on one A100, as its author measured it.
    parser.add_argument("--step-ms", type=float, default=2590 / 200, help="one GPU's step (default: %(default).4g)")
    parser.add_argument("--batch", type=int, default=2000, help="images of that step (default: %(default)s)")
    parser.add_argument("--model", choices=MODELS, default="speed", help="default: %(default)s, the model of speed94")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw efficiency over the number of GPUs")
    args = parser.parse_args(argv)
    if not args.step_ms > 0 or args.batch < 1:
        parser.error(f"--step-ms {args.step_ms:g} and --batch {args.batch} must be above 0")
    compute, size = args.step_ms / 1000, gradient_bytes(args.model)
    title = f"{args.model}: {args.step_ms:.4g} ms for {args.batch:,} images, {size / 1e6:.2f} MB of gradients"
    print(title + "\n")
    print("\n".join(table(compute, args.batch, size)))
    if args.plot is not None:
        draw(args.plot, compute, args.batch, size, title)


if __name__ == "__main__":
    main()
