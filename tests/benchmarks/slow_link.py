"""Measure the seconds to an accuracy of two hosts on a slow link, by the way in which they exchange what they learn.

    python -m tests.benchmarks.slow_link --json slow.json --out slow.png     # all of it: hours
    python -m tests.benchmarks.slow_link --json slow.json --measure cost     # only the seconds and bytes of a step
    python -m tests.benchmarks.slow_link --json slow.json --measure          # nothing: the tables again

Each host is a network namespace of this machine; `tc` limits the virtual cable between them. Needs root and iproute2.
The steps to the accuracy do not depend on the link, nor on other programs: they are counted once for a seed, without a
limit. The seconds to the accuracy are these steps times the cost of one, for which the machine should be idle. The
first steps of PowerSGD, whose gradients are sent whole, cost as much as those of `none`.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from math import isnan, nan
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cifar.distributed.ddp import ddp_options
from cifar.records.plotting import Figure, LogLocator, default_style
from tests.helpers.hosts import ADDRESSES, Hosts, why_not
from tests.helpers.measuring import machine
from tests.helpers.processes import clean_environment, rank_variables

TARGETS = {"net-fast": (0.62, 64), "wide": (0.75, 192)}  # accuracy, and the steps between two tests
METHODS = ("none", "bf16", "powersgd-1", "powersgd-2", "powersgd-4", "local-8", "local-32")  # see `link_worker`
LINKS = ("unlimited", "1000", "100", "10")  # Mbit/s
WHOLE_STEPS = ddp_options("powersgd").comm_state_option["start_powerSGD_iter"] - 1  # one of them is settle_buckets'


def train(methods: list[str], recipe: str, link: str, *words: object) -> Iterator[dict[str, Any]]:
    """Start `link_worker` on two hosts; yield what rank zero measures for each method, as soon as it is there."""
    command = (sys.executable, "-m", "tests.benchmarks.link_worker", ",".join(methods), recipe, *words)
    with Hosts() as hosts:
        if link != "unlimited":
            hosts.slow_down(float(link))
        ranks = []
        for rank in (0, 1):
            place = rank_variables(rank, 2, alone=True) | {"MASTER_ADDR": ADDRESSES[0]}
            environment = clean_environment(GLOO_SOCKET_IFNAME="cable", CUDA_VISIBLE_DEVICES="", **place)
            started = hosts.on(rank, *command)
            ranks.append(subprocess.Popen(started, env=environment, stdout=subprocess.PIPE, text=True))
        yield from (json.loads(line) for line in ranks[0].stdout or () if line.startswith("{"))
        if {rank.wait() for rank in ranks} != {0}:
            raise SystemExit("slow_link: error: a host failed")


def measure(args: argparse.Namespace, record: dict[str, Any], recipe: str) -> None:
    """Add to `record`, and to its file after each method, what the command line asks for."""

    def add(part: str, place: object, measured: Iterator[dict[str, Any]]) -> None:
        for found in measured:
            record[part][f"{recipe}/{found['method']}/{place}"] = found
            args.json.write_text(json.dumps(record, indent=1) + "\n")

    for seed in args.seeds if "steps" in args.measure else ():
        methods = [method for method in args.methods if f"{recipe}/{method}/{seed}" not in record["steps"]]
        if methods:
            add("steps", seed, train(methods, recipe, "unlimited", seed, *TARGETS[recipe]))
    for link in args.links if "cost" in args.measure else ():
        record["machine"] = machine()
        add("cost", link, train(args.methods, recipe, link, 0, 0, 0))


def arrivals(record: dict[str, Any], recipe: str, method: str) -> list[int | None]:
    """Return the first tested step with the accuracy for each seed, or None if there is none."""
    seeds = [found["accuracies"] for name, found in record["steps"].items() if name.startswith(f"{recipe}/{method}/")]
    target, _ = TARGETS[recipe]
    return [next((int(step) for step, accuracy in seed.items() if accuracy >= target), None) for seed in seeds]


def costs(record: dict[str, Any], recipe: str, method: str, link: str, unit: str) -> list[float]:
    """Return the "seconds" or the "bytes" to the accuracy for each seed that arrives; NaN if they were not measured."""
    steps = [count for count in arrivals(record, recipe, method) if count]
    step, whole_step = (record["cost"].get(f"{recipe}/{name}/{link}", {unit: nan}) for name in (method, "none"))
    whole = WHOLE_STEPS if method.startswith("powersgd") else 0
    return [whole * whole_step[unit] + (count - whole) * step[unit] for count in steps]


def table(args: argparse.Namespace, record: dict[str, Any], recipe: str) -> Iterator[str]:
    """Yield the lines of a recipe's table, in Markdown."""
    names = [link if link == "unlimited" else f"{int(link):,} Mbit/s" for link in args.links]
    yield f"| `{recipe}` to {100 * TARGETS[recipe][0]:g} % | arrive | steps | MB sent | {' | '.join(names)} |"
    yield "| --- |" + " --- |" * (3 + len(names))
    for method in args.methods:
        steps = arrivals(record, recipe, method)
        if not steps:  # not measured
            continue
        arrived = [count for count in steps if count]
        megabytes = [sent / 1e6 for sent in costs(record, recipe, method, args.links[0], "bytes")]
        cells = [f"{len(arrived)} of {len(steps)}", _mean(arrived), _mean(megabytes)]
        cells += [_mean(costs(record, recipe, method, link, "seconds"), " s") for link in args.links]
        yield f"| {method} | " + " | ".join(cells) + " |"


def _mean(values: list[Any], unit: str = "") -> str:
    """Return mean and standard deviation, or why there are none."""
    if any(isnan(value) for value in values):
        return "not measured"
    spread = f" ± {stdev(values):,.0f}" if len(values) > 1 else ""
    return f"{mean(values):,.0f}{spread}{unit}" if values else "never"


def draw(args: argparse.Namespace, record: dict[str, Any]) -> None:
    """Draw the seconds to the accuracy over the rate of the link."""
    links = [link for link in args.links if link != "unlimited"]
    with default_style():
        figure = Figure(figsize=(5.5 * len(args.recipes), 4.5), layout="constrained")
        for place, recipe in enumerate(args.recipes, 1):
            axes = figure.add_subplot(1, len(args.recipes), place, xscale="log", yscale="log")
            for method in (method for method in args.methods if arrivals(record, recipe, method)):
                seconds = {float(link): costs(record, recipe, method, link, "seconds") for link in links}
                means = {link: mean(values) for link, values in seconds.items() if values}  # NaN is not drawn
                axes.plot(list(means), list(means.values()), "o-", label=method if means else f"{method}: never")
            axes.set(title=f"{recipe} to {100 * TARGETS[recipe][0]:g} %", xlabel="Mbit/s", ylabel="seconds")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            for axis in (axes.xaxis, axes.yaxis):  # default_style leaves out the mathematics of 10^2
                axis.set_major_formatter("{x:,g}")
                axis.set_minor_formatter("")
            axes.legend()
        figure.savefig(args.out, dpi=100)


def main() -> None:
    """Measure what is asked for, and print the tables."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks.slow_link", description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs="*", choices=("steps", "cost"), default=["steps", "cost"])
    parser.add_argument("--recipes", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--links", nargs="+", choices=LINKS, default=LINKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, required=True, help="what has been measured; later calls add to it")
    parser.add_argument("--out", type=Path, help="picture to draw")
    args = parser.parse_args()
    if args.measure and (missing := why_not()) is not None:
        parser.exit(2, f"slow_link: error: {missing}\n")
    record = json.loads(args.json.read_text()) if args.json.exists() else {"steps": {}, "cost": {}}
    for recipe in args.recipes:
        measure(args, record, recipe)
        print("\n".join(table(args, record, recipe)), flush=True)
    if args.out is not None:
        draw(args, record)


if __name__ == "__main__":
    main()
