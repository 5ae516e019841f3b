"""What gradient compression is worth on a slow link: images/s of two hosts, as a table.

    python -m tests.benchmarks.slow_link --rates 100 10

Each host is a network namespace of this machine (root and iproute2 needed), the link between them a virtual cable that
`tc` lets carry so many Mbit/s. Only ratios between lines mean something: both hosts share this machine's processors.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.children import run_windows, steady
from tests.benchmarks.measure import machine
from tests.helpers.hosts import ADDRESSES, Hosts, why_not
from tests.helpers.processes import ROOT, clean_environment

HOOKS = ("none", "bf16", "powersgd")
WARM_UP = 24  # steps that are not measured; PowerSGD leaves the first 20 as they are


def measure(hosts: Hosts, folder: Path, hook: str, args: argparse.Namespace) -> float:
    """Images/s of both hosts together, after `WARM_UP` steps."""
    flags = (
        "--device", "cpu", "--dataset", "synthetic", "--recipe", "wide", "--model", args.model, "--wandb", "disabled",
        "--local-batch-size", args.batch, "--max-steps", WARM_UP + args.steps, "--log-steps", WARM_UP,
        "--comm-hook", hook, "--run-dir", folder,
    )  # fmt: skip
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = clean_environment(PATH=path, CUDA_VISIBLE_DEVICES="")
    command = [ROOT / "launch" / "multi_node.sh", ADDRESSES[0], "2", *flags]
    started = [
        subprocess.Popen(
            hosts.on(host, *command), cwd=folder.parent, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for host in (0, 1)
    ]  # fmt: skip
    said = [process.communicate()[1] for process in started]
    for process, complaint in zip(started, said, strict=True):
        if process.returncode:
            raise SystemExit(f"slow_link: error: a host failed: {complaint[-2000:]}")
    return steady(run_windows(folder))


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks.slow_link", description=__doc__.splitlines()[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[100, 10], metavar="MBIT", help="Mbit/s")
    parser.add_argument("--model", default="net-wide", help="net (default: net-wide, 3.9 MB of gradients)")
    parser.add_argument("--batch", type=int, default=64, help="images of a host in a step (default: 64)")
    parser.add_argument("--steps", type=int, default=48, help="steps that are measured (default: 48)")
    args = parser.parse_args()
    if (missing := why_not()) is not None:
        parser.exit(2, f"slow_link: error: {missing}\n")
    print(", ".join(f"{key} {value}" for key, value in machine().items()), flush=True)
    print("| link | " + " | ".join(HOOKS) + " |\n| --- |" + " --- |" * len(HOOKS))
    with tempfile.TemporaryDirectory(prefix="slow-link-") as folder, Hosts() as hosts:
        for rate in (None, *args.rates):
            if rate is not None:
                hosts.slow_down(rate)
            speeds = [measure(hosts, Path(folder) / f"{rate}-{hook}", hook, args) for hook in HOOKS]
            cells = (f"{speed:,.0f} images/s, {speed / speeds[0]:.2f} x" for speed in speeds)
            name = "unlimited" if rate is None else f"{rate:g} Mbit/s"
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
