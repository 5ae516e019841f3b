"""Alternating runs, their statistics, and a description of the machine."""

import os
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

Numbers = Mapping[str, float]
"""The measurements of one run, by the name of the metric."""

Program = Callable[[int], Numbers]
"""Runs a program once in a new process, with the number of the round as the seed."""

OURS = "ours"


@dataclass(frozen=True)
class Metric:
    """A number that every program of a comparison reports.

    Attributes:
        compare: "less" or "more", whichever is better: the comparison is how many times better ours is. "cost": how
            much more ours takes, in percent. "none": no comparison.
    """

    name: str
    unit: str
    compare: Literal["less", "more", "cost", "none"] = "less"
    digits: int = 1

    def against(self, ours: float, baseline: float) -> float | None:
        """Compare ours with the baseline's."""
        match self.compare:
            case "less":
                return baseline / ours
            case "more":
                return ours / baseline
            case "cost":
                return 100 * (ours / baseline - 1)
        return None

    def show(self, comparison: float) -> str:
        """Format a result of `against`."""
        return f"{comparison:+.1f} %" if self.compare == "cost" else f"{comparison:.2f} x"


@dataclass(frozen=True)
class Comparison:
    """Programs that do the same work: `OURS`, then the baselines."""

    title: str
    programs: Mapping[str, Program]
    metrics: Sequence[Metric]
    rounds: int = 3


@dataclass(frozen=True)
class Row:
    """Statistics of one metric of one program. `comparison` is (median, min, max) over the rounds; None for ours."""

    metric: str
    program: str
    median: float
    mean: float
    min: float
    max: float
    comparison: tuple[float, float, float] | None


def alternate(
    comparison: Comparison, rounds: int, before_run: Callable[[str, int], None] = lambda program, number: None
) -> dict[str, list[Numbers]]:
    """Run the programs in turn (A B A B ...), so that other load on the machine affects all of them alike."""
    runs: dict[str, list[Numbers]] = {name: [] for name in comparison.programs}
    for number in range(rounds):
        for name, program in comparison.programs.items():
            before_run(name, number)
            runs[name].append(program(number))
    return runs


def summarize(comparison: Comparison, runs: Mapping[str, Sequence[Numbers]]) -> list[Row]:
    """Return a row for each metric and program.

    Compares round by round and takes the median of that, because the runs of a round met the same load.
    """
    rows = []
    for metric in comparison.metrics:
        ours = [numbers[metric.name] for numbers in runs[OURS]]
        for name in comparison.programs:
            values = [numbers[metric.name] for numbers in runs[name]]
            pairs = [metric.against(a, b) for a, b in zip(ours, values, strict=True)] if name != OURS else []
            known = [pair for pair in pairs if pair is not None]
            compared = (statistics.median(known), min(known), max(known)) if known else None
            median, mean = statistics.median(values), statistics.fmean(values)
            rows.append(Row(metric.name, name, median, mean, min(values), max(values), compared))
    return rows


def table(comparison: Comparison, rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of a comparison's table."""
    metrics = {metric.name: metric for metric in comparison.metrics}
    names = max(len(name) for name in comparison.programs)
    first = max(len(f"{metric.name}, {metric.unit}") for metric in comparison.metrics)
    heads = "".join(f"{head:>11}" for head in ("median", "mean", "min", "max"))
    yield f"{'':{first}}  {'':{names}}{heads}   ours is (min to max over the rounds)"
    for row in rows:
        metric = metrics[row.metric]
        label = f"{metric.name}, {metric.unit}" if row.program == OURS else ""
        values = "".join(f"{value:11,.{metric.digits}f}" for value in (row.median, row.mean, row.min, row.max))
        compared = ""
        if row.comparison is not None:
            median, low, high = map(metric.show, row.comparison)
            compared = f"   {median} ({low} to {high})"
        yield f"{label:{first}}  {row.program:{names}}{values}{compared}"


def machine() -> dict[str, Any]:
    """Return the date, the hardware and the versions that a measurement depends on."""
    import torch

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": os.getloadavg()[0],  # well above zero: other programs share the machine
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
