"""Compare runs in a table and a plot: python -m cifar.compare RUN_DIR [RUN_DIR ...]"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from cifar.cli import exit_on_error, parse_flags
from cifar.errors import UserError
from cifar.metrics import Series, read_metrics, seconds_of_training, series

_COLUMNS = ("accuracy", "with TTA", "seconds", "images/s", "steps", "processes", "batch", "lr", "seed", "run")


@dataclass(frozen=True)
class Comparison:
    """Compare runs, finished or not: a table, the most accurate first, and test accuracy over time as a picture."""

    run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories, runs/NAME, or directories of them, such as runs or a sweep's."""
    out: Path = Path("compare.png")
    """The picture, a PNG file; overwritten if it exists."""


@dataclass(frozen=True)
class Run:
    """The records of a run.

    Attributes:
        config: the resolved configuration.
        result: result.json, or None if the run has not finished.
        accuracy: the test accuracy of the last evaluation, 0 to 1; None before the first.
        by_seconds, by_images: test accuracy over seconds of training, and over training images seen.
    """

    name: str
    config: dict[str, Any]
    world_size: int
    result: dict[str, Any] | None
    steps: int
    accuracy: float | None
    by_seconds: Series
    by_images: Series


def run_dirs(path: Path) -> list[Path]:
    """Return the run directories in `path`, or `path` itself if it contains none."""
    inside = sorted(config.parent for config in path.glob("*/config.json"))
    return [path] if (path / "config.json").exists() or not inside else inside


def read_run(run_dir: Path) -> Run:
    """Read the run in `run_dir`.

    Raises:
        UserError: there is none.
    """
    try:
        content = json.loads((run_dir / "config.json").read_text())
        result_path = run_dir / "result.json"
        result = json.loads(result_path.read_text()) if result_path.exists() else None
        config, world_size = content["config"], content["world_size"]
        batch = config["global_batch_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run_dir} is not a run directory: {type(error).__name__}: {error}") from error
    records = read_metrics(run_dir)
    tests = series(records, "test/accuracy")
    seconds = dict(seconds_of_training(records, batch))
    return Run(
        name=run_dir.resolve().name,
        config=config,
        world_size=world_size,
        result=result,
        steps=int(records[-1]["step"]) if records else 0,
        accuracy=tests[-1][1] if tests else None,
        by_seconds=[(seconds[step], accuracy) for step, accuracy in tests if step in seconds],
        by_images=[(step * batch, accuracy) for step, accuracy in tests],
    )


def table(runs: Sequence[Run]) -> list[str]:
    """Return the lines of the table, the most accurate run first."""
    rows = [_COLUMNS]
    for run in sorted(runs, key=lambda run: -1.0 if run.accuracy is None else run.accuracy, reverse=True):
        done, config = run.result or {}, run.config
        tta = done.get("test_accuracy_tta")
        seconds = done.get("train_seconds", run.by_seconds[-1][0] if run.by_seconds else None)
        images = run.steps * config["global_batch_size"]
        rows.append(
            (
                "-" if run.accuracy is None else f"{100 * run.accuracy:.2f} %",
                "-" if tta is None else f"{100 * tta:.2f} %",
                "-" if seconds is None else f"{seconds:,.1f}",
                f"{images / seconds:,.0f}" if seconds else "-",
                f"{run.steps:,}",
                f"{run.world_size}",
                f"{config['global_batch_size']:,}",
                f"{config['lr']:g}",
                f"{config['seed']}",
                run.name + ("" if run.result else " (not finished)"),
            )
        )
    widths = [max(len(row[k]) for row in rows) for k in range(len(_COLUMNS))]
    return ["  ".join([*map(str.rjust, row[:-1], widths), row[-1]]) for row in rows]


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw test accuracy over seconds of training and over images seen into the PNG file `path`.

    Raises:
        OSError: it cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
        matplotlib.rcParams["text.parse_math"] = False  # a run's name may contain dollar signs
        figure = Figure(figsize=(13, 5), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for run in runs:
            for axis, points in zip(axes, (run.by_seconds, run.by_images), strict=True):
                axis.plot([x for x, _ in points], [100 * y for _, y in points], "o-", label=run.name, markersize=4)
        axes[0].set(xlabel="seconds of training", ylabel="test accuracy, %")
        axes[1].set(xlabel="training images seen")
        axes[1].xaxis.set_major_formatter(EngFormatter())
        for axis in axes:
            axis.set_xlim(left=0)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
        figure.savefig(path, format="png", dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table and draw the picture."""
    asked = parse_flags(Comparison, argv, prog="python -m cifar.compare")
    if not asked.run_dirs:
        raise UserError("no run is named: python -m cifar.compare RUN_DIR [RUN_DIR ...]")
    runs = [read_run(run_dir) for path in asked.run_dirs for run_dir in run_dirs(path)]
    synthetic = {run.name for run in runs if run.result and run.result["dataset"] == "synthetic"}
    print("\n".join(table(runs)))
    if synthetic:
        print(f"on the synthetic dataset, not on CIFAR-10: {', '.join(sorted(synthetic))}")
    try:
        draw(runs, asked.out)
    except OSError as error:
        raise UserError(f"the picture cannot be written to {asked.out}: {error}") from error
    print(f"picture: {asked.out}")


if __name__ == "__main__":
    with exit_on_error("cifar.compare"):
        main()
