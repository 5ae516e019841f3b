"""Measure the gain of gradient compression on a slow link, as a table of images/s of two hosts.

    python -m tests.benchmarks.slow_link --rates 100 10

Each host is a network namespace of this machine; `tc` limits the virtual cable between them to a rate in Mbit/s. Needs
root and iproute2. Compare only the columns of a line: both hosts share the processors of this machine.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers.hosts import ADDRESSES, Hosts, why_not
from tests.helpers.measuring import images_per_second, machine
from tests.helpers.processes import ROOT, clean_environment

HOOKS = ("none", "bf16", "powersgd")
WARM_UP = 24  # steps that are not measured; PowerSGD sends the gradients of the first 20 whole


def measure(hosts: Hosts, run_dir: Path, hook: str, args: argparse.Namespace) -> float:
    """Return the images/s of both hosts together after `WARM_UP` steps."""
    flags = (
        "--device", "cpu", "--dataset", "synthetic", "--recipe", "wide", "--model", args.model, "--wandb", "disabled",
        "--local-batch-size", args.batch, "--max-steps", WARM_UP + args.steps, "--log-steps", WARM_UP,
        "--comm-hook", hook, "--run-dir", run_dir,
    )  # fmt: skip
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = clean_environment(PATH=path, CUDA_VISIBLE_DEVICES="")
    command = [ROOT / "launch" / "multi_node.sh", ADDRESSES[0], "2", *flags]
    started = [
        subprocess.Popen(
            hosts.on(host, *command), cwd=run_dir.parent, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for host in (0, 1)
    ]  # fmt: skip
    errors = [process.communicate()[1] for process in started]
    for process, error in zip(started, errors, strict=True):
        if process.returncode:
            raise SystemExit(f"slow_link: error: a host failed: {error[-2000:]}")
    return images_per_second(run_dir)


def main() -> None:
    """Measure each hook at each rate, and print the table."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks.slow_link", description=__doc__.splitlines()[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[100, 10], metavar="MBIT")
    parser.add_argument("--model", default="net-wide", help="default: net-wide, 3.9 MB of gradients")
    parser.add_argument("--batch", type=int, default=64, help="images of a host in a step (default: 64)")
    parser.add_argument("--steps", type=int, default=48, help="measured steps (default: 48)")
    args = parser.parse_args()
    if (missing := why_not()) is not None:
        parser.exit(2, f"slow_link: error: {missing}\n")
    print(", ".join(f"{key} {value}" for key, value in machine().items()), flush=True)
    print("| link | " + " | ".join(HOOKS) + " |\n| --- |" + " --- |" * len(HOOKS))
    with tempfile.TemporaryDirectory(prefix="slow-link-") as directory, Hosts() as hosts:
        for rate in (None, *args.rates):
            if rate is not None:
                hosts.slow_down(rate)
            speeds = [measure(hosts, Path(directory) / f"{rate}-{hook}", hook, args) for hook in HOOKS]
            cells = (f"{speed:,.0f} images/s, {speed / speeds[0]:.2f} x" for speed in speeds)
            name = "unlimited" if rate is None else f"{rate:g} Mbit/s"
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
