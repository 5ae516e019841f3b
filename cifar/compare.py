"""Compare runs in a table and a plot: python -m cifar.compare RUN_DIR [RUN_DIR ...]"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from cifar.command import exit_on_error, parse_flags
from cifar.errors import UserError, first_line
from cifar.files import read_json
from cifar.records.metrics import Series, parts, read_metrics, series


@dataclass(frozen=True)
class Comparison:
    """Compare runs, finished or not: a table, the most accurate first, and test accuracy over time as a picture."""

    run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories, runs/NAME, or directories of them, such as runs or a sweep's."""
    out: Path = Path("compare.png")
    """The picture, a PNG file; overwritten if it exists."""


@dataclass(frozen=True)
class RecordedRun:
    """The records of a run."""

    name: str
    cells: dict[str, str]  # the row of the table, by column
    accuracy: float | None  # in the last test, 0 to 1; None before the first
    by_seconds: Series  # test accuracy over seconds of training
    by_images: Series  # ... and over training images seen


def run_dirs(path: Path) -> list[Path]:
    """Return the run directories in `path`, or `path` itself if it contains none."""
    inside = sorted(config.parent for config in path.glob("*/config.json"))
    return [path] if not inside or (path / "config.json").exists() else inside


def read_run(run_dir: Path) -> RecordedRun:
    """Read the run in `run_dir`; a UserError tells that there is none, or that its records are damaged."""
    try:
        facts, records = read_json(run_dir / "config.json"), read_metrics(run_dir)
        result_file = run_dir / "result.json"
        result = read_json(result_file) if result_file.exists() else {}
        return _summarize(run_dir.resolve().name, facts, records, result)
    except FileNotFoundError as error:
        raise UserError(f"{run_dir} is not a run directory: it has no config.json") from error
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise UserError(f"the records in {run_dir} cannot be read: {type(error).__name__}: {error}") from error


def _summarize(name: str, facts: dict[str, Any], records: list[dict[str, Any]], result: dict[str, Any]) -> RecordedRun:
    """Return the run of these records: config.json, the lines of metrics.jsonl, and result.json."""
    config = facts["config"]
    batch, lr = int(config["global_batch_size"]), float(config["lr"])
    if config.get("lr_scaling") != "none":  # of a run of an older version, lr is as stated
        lr *= batch / int(config.get("lr_batch_size", batch))
    steps = records[-1]["step"] if records else 0
    if result and int(result["steps"]) != steps:  # the run has been continued since
        result = {}
    tests = series(records, "test/accuracy")
    accuracy = tests[-1][1] if tests else None
    clock = dict(seconds_of_training(records, batch))
    seconds = result.get("train_seconds", max(clock.values()) or None)
    cells = {
        "accuracy": _shown("{:.2f} %", accuracy, 100),
        "with TTA": _shown("{:.2f} %", result.get("test_accuracy_tta"), 100),
        "seconds": _shown("{:,.1f}", seconds),
        "first step": _shown("{:,.2f}", result.get("first_step_seconds")),
        "images/s": _shown("{:,.0f}", steps * batch / seconds if seconds else None),
        "steps": f"{steps:,}",
        "processes": ", ".join(str(int(size)) for (size,) in parts(facts, steps, "world_size")),
        "batch": f"{batch:,}",
        "lr": f"{lr:g}",
        "precision": str(config.get("precision", "-")),
        "seed": f"{int(config['seed'])}",
        "recipe": str(config.get("recipe", "-")),
        "model": str(config.get("model", "-")),
        "pixels": str(facts.get("image_size", "-")),
        "dataset": str((result or facts)["dataset"]),
        "run": name + ("" if result else " (not finished)"),
    }
    by_seconds = [(clock[step], value) for step, value in tests if step in clock]
    by_images = [(step * batch, value) for step, value in tests]
    return RecordedRun(name, cells, accuracy, by_seconds, by_images)


def seconds_of_training(records: list[dict[str, Any]], global_batch_size: int) -> Series:
    """Return (step, seconds of training until then) at the log points, computed from their images per second."""
    points, seconds, before = [(0.0, 0.0)], 0.0, 0.0
    for step, rate in series(records, "train/images_per_second"):
        seconds += (step - before) * global_batch_size / rate
        before = step
        points.append((step, seconds))
    return points


def _shown(form: str, value: float | None, factor: float = 1) -> str:
    return "-" if value is None else form.format(factor * float(value))


def table(runs: Sequence[RecordedRun]) -> list[str]:
    """Return the lines of the table, the most accurate run first."""
    best_first = sorted(runs, key=lambda run: -1.0 if run.accuracy is None else run.accuracy, reverse=True)
    rows = [[*runs[0].cells], *([*run.cells.values()] for run in best_first)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([*map(str.rjust, row[:-1], widths), row[-1]]) for row in rows]


def draw(runs: Sequence[RecordedRun], path: Path) -> None:
    """Draw test accuracy over seconds of training and over images seen into the PNG file `path`."""
    from cifar.records.plotting import EngFormatter, Figure, default_style  # matplotlib takes a second to import

    with default_style():
        figure = Figure(figsize=(13, 5), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for number, run in enumerate(runs):
            line = ("o-", "s--", "^:", "v-.")[number // 10 % 4]  # there are ten colors
            for axis, points in zip(axes, (run.by_seconds, run.by_images), strict=True):
                axis.plot([x for x, _ in points], [100 * y for _, y in points], line, label=run.name, markersize=4)
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
    runs: list[RecordedRun] = []
    problems: list[str] = []
    for run_dir in (run_dir for path in asked.run_dirs for run_dir in run_dirs(path)):
        try:
            runs.append(read_run(run_dir))
        except UserError as error:  # the others can be compared nevertheless
            problems.append(str(error))
    if runs:
        print("\n".join(table(runs)))
        if synthetic := {run.name for run in runs if run.cells["dataset"] == "synthetic"}:
            print(f"on the synthetic dataset, not on CIFAR-10: {', '.join(sorted(synthetic))}")
        try:
            draw(runs, asked.out)
            print(f"picture: {asked.out}")
        except Exception as error:  # a broken matplotlib or matplotlibrc can raise anything
            problems.append(f"the picture cannot be written to {asked.out}: {first_line(error)}")
    if problems:
        raise UserError("; ".join(problems))


if __name__ == "__main__":
    with exit_on_error("cifar.compare"):
        main()
