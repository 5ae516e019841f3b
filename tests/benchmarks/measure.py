"""What every benchmark needs: contenders that take turns, their statistics, and the machine they ran on."""

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
Contender = Callable[[int], Numbers]
"""Runs once, in a process of its own, for the round with this number, and says what it measured."""

OURS = "ours"


@dataclass(frozen=True)
class Quantity:
    """A number that all contenders of a race report.

    Attributes:
        compare: how ours relates to a peer's. "less" and "more" say which is better, and the comparison is how many
            times better ours is; "cost" is what ours takes on top, in percent; "none" is stated only.
    """

    name: str
    unit: str
    compare: Literal["less", "more", "cost", "none"] = "less"
    digits: int = 1

    def against(self, ours: float, peer: float) -> float | None:
        """Ours compared with the peer's."""
        match self.compare:
            case "less":
                return peer / ours
            case "more":
                return ours / peer
            case "cost":
                return 100 * (ours / peer - 1)
        return None

    def show(self, comparison: float) -> str:
        """What `against` returned, as the table has it."""
        return f"{comparison:+.1f} %" if self.compare == "cost" else f"{comparison:.2f} x"


@dataclass(frozen=True)
class Race:
    """Contenders that do the same work; the first is `OURS`, each other one a peer."""

    title: str
    contenders: Mapping[str, Contender]
    quantities: Sequence[Quantity]
    rounds: int = 3


@dataclass(frozen=True)
class Row:
    """One contender's values of one quantity. `comparison` is (median, min, max) over the rounds, None for ours."""

    quantity: str
    unit: str
    contender: str
    median: float
    mean: float
    min: float
    max: float
    comparison: tuple[float, float, float] | None


def alternate(
    race: Race, rounds: int, tell: Callable[[str, int], None] = lambda name, number: None
) -> dict[str, list[Numbers]]:
    """Run the contenders A B A B ..., so that whatever else the machine does falls on all of them alike."""
    runs: dict[str, list[Numbers]] = {name: [] for name in race.contenders}
    for number in range(rounds):
        for name, contender in race.contenders.items():
            tell(name, number)
            runs[name].append(contender(number))
    return runs


def summarize(race: Race, runs: Mapping[str, Sequence[Numbers]]) -> list[Row]:
    """A row for each quantity and contender.

    Rounds are compared one by one, and the median taken of that: both runs of a round met the same machine.
    """
    rows = []
    for quantity in race.quantities:
        ours = [numbers[quantity.name] for numbers in runs[OURS]]
        for name in race.contenders:
            values = [numbers[quantity.name] for numbers in runs[name]]
            pairs = [quantity.against(a, b) for a, b in zip(ours, values, strict=True)] if name != OURS else []
            known = [pair for pair in pairs if pair is not None]
            rows.append(
                Row(
                    quantity.name,
                    quantity.unit,
                    name,
                    statistics.median(values),
                    statistics.fmean(values),
                    min(values),
                    max(values),
                    (statistics.median(known), min(known), max(known)) if known else None,
                )
            )
    return rows


def table(race: Race, rows: Sequence[Row]) -> Iterator[str]:
    """The lines of a race's table."""
    names = max(len(name) for name in race.contenders)
    first = max(len(f"{quantity.name}, {quantity.unit}") for quantity in race.quantities)
    heads = "".join(f"{head:>11}" for head in ("median", "mean", "min", "max"))
    yield f"{'':{first}}  {'':{names}}{heads}   ours is (min to max over the rounds)"
    quantities = {quantity.name: quantity for quantity in race.quantities}
    for row in rows:
        quantity = quantities[row.quantity]
        label = f"{row.quantity}, {row.unit}" if row.contender == OURS else ""
        values = "".join(f"{value:11,.{quantity.digits}f}" for value in (row.median, row.mean, row.min, row.max))
        comparison = ""
        if row.comparison is not None:
            median, low, high = map(quantity.show, row.comparison)
            comparison = f"   {median} ({low} to {high})"
        yield f"{label:{first}}  {row.contender:{names}}{values}{comparison}"


def machine() -> dict[str, Any]:
    """Where and when this is measured."""
    import torch

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": os.getloadavg()[0],  # above zero: somebody else is at work here
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def cpu_name() -> str:
    """The processor's name, as Linux states it, or what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
