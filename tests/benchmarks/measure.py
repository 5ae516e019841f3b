"""Comparisons: programs that run in turn, and the statistics of their numbers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tests.helpers.measuring import spread

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

    def against(self, ours: float, baseline: float) -> float:
        """Compare ours with the baseline's."""
        if self.compare == "cost":
            return 100 * (ours / baseline - 1)
        return ours / baseline if self.compare == "more" else baseline / ours

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


def summarize(comparison: Comparison, runs: Mapping[str, Sequence[Numbers]]) -> Iterator[dict[str, Any]]:
    """Yield a row for each metric and program: median and range of its numbers, and of how ours compares with them.

    Compares round by round and takes the median of that, because the runs of a round met the same load.
    """
    for metric in comparison.metrics:
        ours = [numbers[metric.name] for numbers in runs[OURS]]
        for name in comparison.programs:
            values = [numbers[metric.name] for numbers in runs[name]]
            row: dict[str, Any] = {"metric": metric.name, "program": name, "median_min_max": spread(values)}
            if name != OURS and metric.compare != "none":
                row["ours_is"] = spread([metric.against(a, b) for a, b in zip(ours, values, strict=True)])
            yield row


def table(comparison: Comparison, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a comparison's table."""
    metrics = {metric.name: metric for metric in comparison.metrics}
    yield f"{'':56}{'median':>11}{'min':>11}{'max':>11}   ours is (min to max over the rounds)"
    for row in rows:
        metric = metrics[row["metric"]]
        label = f"{metric.name}, {metric.unit}" if row["program"] == OURS else ""
        values = "".join(f"{value:11,.{metric.digits}f}" for value in row["median_min_max"])
        compared = ""
        if "ours_is" in row:
            median, low, high = map(metric.show, row["ours_is"])
            compared = f"   {median} ({low} to {high})"
        yield f"{label:32}{row['program']:24}{values}{compared}"
