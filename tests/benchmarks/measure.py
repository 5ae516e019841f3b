"""Comparisons: programs that run in turn, and the statistics of their numbers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

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


def table(comparison: Comparison, runs: Mapping[str, Sequence[Numbers]]) -> Iterator[str]:
    """Yield a line for each metric and program: median and range of its numbers, and of how ours compares with them.

    Compares round by round and takes the median of that, because the runs of a round met the same load.
    """
    for metric in comparison.metrics:
        yield f"{metric.name}, {metric.unit}: median (range over the rounds)"
        ours = [numbers[metric.name] for numbers in runs[OURS]]
        for name in comparison.programs:
            values = [numbers[metric.name] for numbers in runs[name]]
            median, low, high = (f"{value:,.{metric.digits}f}" for value in spread(values))
            compared = ""
            if name != OURS and metric.compare != "none":
                ratios = [metric.against(a, b) for a, b in zip(ours, values, strict=True)]
                compared = ";  ours is {} ({} to {})".format(*map(metric.show, spread(ratios)))
            yield f"  {name:24}{median} ({low} to {high}){compared}"
