"""Scale on paper: seconds per epoch and efficiency on 1 to 1,024 GPUs, from one GPU's step and the alpha-beta model.

    python -m tests.benchmarks.scale                                  # speed94 from its published step on an A100
    python -m tests.benchmarks.scale --model resnet18 --step-ms 40 --batch 512
    python -m tests.benchmarks.scale --check                          # the model against real runs on this CPU

A ring all-reduce of n bytes among p processes sends 2 (p - 1) messages of n / p bytes, one after the other
(Patarasu & Yuan 2009; Thakur, Rabenseifner & Gropp 2005). With alpha seconds for each message and a link of
`bandwidth` bytes per second,

    step(p) = compute(p) + 2 (p - 1) (alpha + n / (p * bandwidth))

without any overlap of the two: a bound, for DistributedDataParallel hides all but the last bucket behind the backward
pass. Weak scaling keeps the batch of each GPU, strong scaling the global one, whose compute is then 1 / p (as if
GPUs were as efficient with few images as with many, which they aren't).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

IMAGES = 50_000
COUNTS = tuple(2**k for k in range(11))


@dataclass(frozen=True)
class Link:
    """What joins neighbours in the ring: seconds a message and bytes per second."""

    name: str
    alpha: float
    bandwidth: float


# Bandwidths are the nominal ones, per direction (NVLink 4: 18 links of 25 GB/s). Latencies are assumptions, of the
# order that is usual for a message between two GPUs, between two hosts with RDMA, and between two hosts over TCP.
LINKS = (Link("NVLink", 3e-6, 450e9), Link("100 Gbit/s", 10e-6, 12.5e9), Link("1 Gbit/s", 50e-6, 0.125e9))


def all_reduce_seconds(processes: int, size: float, link: Link) -> float:
    """Seconds of a ring all-reduce of `size` bytes."""
    return 2 * (processes - 1) * (link.alpha + size / (processes * link.bandwidth))


@dataclass(frozen=True)
class Point:
    """What `processes` GPUs do together; efficiency is the throughput over that of as many GPUs that don't talk."""

    processes: int
    step_seconds: float
    epoch_seconds: float
    efficiency: float


def predict(compute: float, batch: int, size: float, link: Link, processes: int, strong: bool) -> Point:
    """The model.

    Args:
        compute: seconds of one GPU's step on `batch` images.
        size: bytes of the gradients.
        strong: share the batch among the processes, instead of giving each as many.
    """
    own = compute / processes if strong else compute
    step = own + all_reduce_seconds(processes, size, link)
    global_batch = batch if strong else batch * processes
    return Point(processes, step, step * IMAGES / global_batch, own / step)


def gradient_bytes(model: str) -> int:
    """Bytes of the gradients of the net `model`, in fp32."""
    from cifar.models import build_model

    return 4 * sum(parameter.numel() for parameter in build_model(model).parameters() if parameter.requires_grad)


def table(compute: float, batch: int, size: float) -> list[str]:
    """The predictions as Markdown: seconds per epoch and efficiency."""
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
    """Efficiency over the number of GPUs, a panel for each way of scaling."""
    from matplotlib.figure import Figure

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


class Parser(argparse.ArgumentParser):
    """argparse's, whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        """Say it and leave with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Predict, or with --check compare predictions with runs."""
    parser = Parser(
        prog="tests.benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # K. Jordan's airbench94_muon: 8 epochs of 25 steps in 2.59 s on one A100, as its author measured it.
    parser.add_argument("--step-ms", type=float, default=2590 / 200, help="one GPU's step (default: %(default).4g)")
    parser.add_argument("--batch", type=int, default=2000, help="images of that step (default: %(default)s)")
    parser.add_argument("--model", default="speed", help="net whose gradients are exchanged (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--check", action="store_true", help="measure on this CPU with 1, 2 and 4 processes instead")
    args = parser.parse_args(argv)
    from cifar.models import MODELS

    if args.model not in MODELS:
        parser.error(f"unknown model {args.model!r}: choose from {', '.join(MODELS)}")
    if not args.step_ms > 0 or args.batch < 1:
        parser.error(f"--step-ms {args.step_ms:g} and --batch {args.batch} must be above 0")
    if args.check:
        from tests.benchmarks.scale_check import check

        record = check(parser)
    else:
        compute, size = args.step_ms / 1000, gradient_bytes(args.model)
        title = f"{args.model}: {args.step_ms:.4g} ms for {args.batch:,} images, {size / 1e6:.2f} MB of gradients"
        print(title + "\n")
        print("\n".join(table(compute, args.batch, size)))
        if args.plot is not None:
            draw(args.plot, compute, args.batch, size, title)
        points = {
            (kind, link.name): [vars(predict(compute, args.batch, size, link, n, kind == "strong")) for n in COUNTS]
            for kind in ("weak", "strong")
            for link in LINKS
        }
        record = {"inputs": title, "links": [vars(link) for link in LINKS]}
        record |= {f"{kind}, {name}": value for (kind, name), value in points.items()}
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
