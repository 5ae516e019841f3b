"""The picture of a finished run: report.png."""

import json
import math
from pathlib import Path
from typing import Any

from cifar.datasets import CLASSES
from cifar.evaluation import Evaluation
from cifar.files import write_atomically
from cifar.metrics import read_metrics, series

_TRAIN, _TEST, _PALE = "#1f6fb4", "#d9541e", "#9aa5b1"


def draw_report(run_dir: Path, test: Evaluation) -> Path:
    """Draw loss, accuracy and confusion matrix from the records in `run_dir` and from `test`, its last evaluation.

    Returns:
        The path of report.png.

    Raises:
        OSError: it can't be written.
    """
    from matplotlib import rc_context  # no pyplot: nothing here needs a window or global state
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    records = read_metrics(run_dir)
    result = json.loads((run_dir / "result.json").read_text())
    path = run_dir / "report.png"
    style: Any = {
        "font.size": 10, "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    }  # fmt: skip
    with rc_context(style):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08, wspace=0.03, rect=(0, 0, 1, 0.86))
        figure = Figure(figsize=(17, 6.2), layout=layout)
        losses, accuracies, confusion = figure.subplots(1, 3, width_ratios=(1, 1.12, 1.08))
        _write_head(figure, result)
        _draw_losses(losses, records)
        _draw_accuracies(accuracies, records)
        _draw_confusion(confusion, test)
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
    return path


def _write_head(figure: Any, result: dict[str, Any]) -> None:
    stand_in = result["dataset"] == "synthetic"
    images = {"cifar10": "CIFAR-10", "synthetic": "stand-in"}.get(result["dataset"], result["dataset"])
    headline = (
        f"Test accuracy {100 * result['test_accuracy']:.2f} %: {result['test_correct']:,} of "
        f"{result['test_total']:,} {images} images"
    )
    count = result["world_size"]
    details = (
        f"recipe {result['recipe']}   |   net {result['model']}   |   {result['steps']:,} steps of "
        f"{result['global_batch_size']:,} images   |   {count} process{'es' if count > 1 else ''} on "
        f"{result['device']}, {result['precision']}   |   seed {result['seed']}   |   "
        f"{result['train_seconds']:,.0f} s, {result['images_per_second']:,.0f} images/s"
    )
    figure.text(0.012, 0.965, headline, fontsize=17, fontweight="bold", va="top")
    figure.text(0.012, 0.898, details, fontsize=10.5, color="#4a5560", va="top")
    if stand_in:
        figure.text(
            0.988, 0.955, "BUILT-IN STAND-IN IMAGES, NOT CIFAR-10", fontsize=12, fontweight="bold", color="white",
            ha="right", va="top", bbox={"boxstyle": "round,pad=0.5", "facecolor": "#b3261e", "edgecolor": "none"},
        )  # fmt: skip


def _columns(records: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the records of `name` that can be drawn."""
    points = series(records, name)
    return [step for step, _ in points], [value for _, value in points]


def _draw_losses(axes: Any, records: list[dict[str, Any]]) -> None:
    train, test = _columns(records, "train/loss"), _columns(records, "test/loss")
    axes.plot(*train, color=_TRAIN, label="training, running mean", linewidth=1.6, **_dots(train))
    axes.plot(*test, "o-", color=_TEST, label="test", linewidth=1.6, markersize=5)
    axes.set(title="Cross-entropy", xlabel="optimizer step")
    axes.set_xlim(left=0)
    axes.legend(frameon=False)


def _dots(columns: tuple[list[float], list[float]]) -> dict[str, Any]:
    """A line needs two points to be seen."""
    return {"marker": "o", "markersize": 5} if len(columns[0]) < 2 else {}


def _draw_accuracies(axes: Any, records: list[dict[str, Any]]) -> None:
    """The accuracy over the run, and that of each class, named at the end of its line instead of in a legend."""
    ends = []
    for name in CLASSES:
        steps, values = _columns(records, f"test_class/{name}")
        axes.plot(steps, [100 * value for value in values], ".-", color=_PALE, linewidth=1, alpha=0.7)
        ends += [(100 * values[-1], name)] if values else []
    steps, values = _columns(records, "test/accuracy")
    axes.plot(steps, [100 * value for value in values], "o-", color=_TEST, linewidth=2.4, markersize=6, zorder=3)
    ends += [(100 * values[-1], "all classes")] if values else []
    axes.set(title="Test accuracy, %", xlabel="optimizer step", ylim=(0, 100))
    axes.set_xlim(left=0)
    ends.sort()
    for (value, name), height in zip(ends, _spread([value for value, _ in ends], gap=4.6), strict=True):
        mine = name == "all classes"
        axes.annotate(
            f"{name} {value:.1f}", (steps[-1] if steps else 0, value), (1.05, height),
            textcoords=axes.get_yaxis_transform(), va="center", fontsize=9.5 if mine else 8.5,
            color=_TEST if mine else "#4a5560", fontweight="bold" if mine else "normal", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": _TEST if mine else _PALE, "linewidth": 0.6, "relpos": (0, 0.5)},
        )  # fmt: skip


def _spread(values: list[float], gap: float) -> list[float]:
    """Heights between 0 and 100 for labels at the ascending `values`: near them and at least `gap` apart."""

    def push_up(heights: list[float], least: float) -> list[float]:
        pushed = []
        for height in heights:
            pushed.append(max(height, least))
            least = pushed[-1] + gap
        return pushed

    def push_down(heights: list[float], most: float) -> list[float]:
        return [-height for height in push_up([-height for height in reversed(heights)], -most)][::-1]

    # Halfway between pushing up and pushing down, each of which keeps the gaps; then back into the picture.
    up, down = push_up(values, -math.inf), push_down(values, math.inf)
    return push_up(push_down([(a + b) / 2 for a, b in zip(up, down, strict=True)], 99), 1)


def _draw_confusion(axes: Any, test: Evaluation) -> None:
    confusion = test.confusion()
    shares = confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(confusion.tolist()):
        for j, count in enumerate(row):
            color = "white" if shares[i, j] > 0.5 else "#23303c" if count else "#c4ccd4"
            weight = "bold" if i == j else "normal"
            axes.text(j, i, f"{count}", ha="center", va="center", fontsize=8.5, color=color, fontweight=weight)
    axes.set_xticks(range(len(CLASSES)), CLASSES, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(CLASSES)), CLASSES)
    axes.set(title="Confusion matrix, images", xlabel="predicted class", ylabel="true class")
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
