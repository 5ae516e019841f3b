"""The report of a finished run: index.html, which needs no other file, and report.png."""

import base64
import io
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from PIL import Image
from torch import Tensor

from cifar.evaluation import MANY_CLASSES, Evaluation
from cifar.files import write_atomically
from cifar.metrics import read_metrics, series
from cifar.plotting import Axes, ConstrainedLayoutEngine, Figure, default_style

_WRONG_IMAGES = 36

# Colours of the charts. In the page, CSS variables replace them, so that the charts follow its colour scheme.
_INK, _SOFT, _LINE, _TRAIN, _TEST = "#1d2733", "#5b6875", "#d9dfe5", "#1f6fb4", "#c9480f"
_VARIABLES = {_INK: "--ink", _SOFT: "--soft", _LINE: "--line", _TRAIN: "--train", _TEST: "--test"}
_STYLE: Any = {
    "font.size": 10, "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": _LINE,
    "text.color": _INK, "axes.titlecolor": _INK, "axes.labelcolor": _SOFT, "axes.edgecolor": _SOFT,
    "xtick.color": _SOFT, "ytick.color": _SOFT,
    "svg.fonttype": "none", "svg.hashsalt": "cifar-ddp",
}  # fmt: skip

Records = list[dict[str, Any]]
T = TypeVar("T")


def write_report(run_dir: Path, test: Evaluation, images: Tensor) -> None:
    """Write index.html and report.png from the records in `run_dir` and from `test`, its last evaluation.

    Args:
        images: the test set, uint8 [n, 3, 32, 32].

    Raises:
        OSError: they cannot be written.
    """
    records = read_metrics(run_dir)
    result = json.loads((run_dir / "result.json").read_text())
    config = json.loads((run_dir / "config.json").read_text())
    with default_style(_STYLE):
        page = _page(run_dir.resolve().name, records, result, config, test, images)
        figure = _figure(records, result, config, test)
        write_atomically(run_dir / "index.html", lambda file: file.write(page.encode()))
        write_atomically(run_dir / "report.png", lambda file: figure.savefig(file, format="png", dpi=110))


def _headline(result: dict[str, Any]) -> str:
    accuracy, total = f"{100 * result['test_accuracy']:.2f} %", f"{result['test_total']:,} test images"
    return f"Test accuracy {accuracy}: {result['test_correct']:,} of {total}"


def _facts(result: dict[str, Any]) -> list[str]:
    tta = result.get("test_accuracy_tta")
    with_tta = [f"{100 * tta:.2f} % with test-time augmentation ({result['tta']})"] if tta is not None else []
    return [
        *with_tta,
        f"dataset {result['dataset']}",
        f"recipe {result['recipe']}",
        f"model {result['model']}",
        f"{result['steps']:,} steps of {result['global_batch_size']:,} images",
        f"{result['trained_on']}, {result['precision']}",
        f"seed {result['seed']}",
        f"{result['train_seconds']:,.0f} s of training, {result['images_per_second']:,.0f} images/s",
    ]


def _page(
    name: str, records: Records, result: dict[str, Any], config: dict[str, Any], test: Evaluation, images: Tensor
) -> str:
    """Return index.html."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cifar", "."), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    wrong = [
        {
            "index": i,
            "png": _png(images[i]),
            "label": test.classes[test.labels[i]],
            "predicted": test.classes[test.predicted[i]],
            "confidence": float(test.confidence[i]),
        }
        for i in test.most_confidently_wrong(_WRONG_IMAGES)
    ]
    return environment.get_template("report.html.jinja").render(
        name=name,
        headline=_headline(result),
        facts=_facts(result),
        synthetic=result["dataset"] == "synthetic",
        charts={
            "Cross-entropy": _svg(partial(_draw_losses, smoothing=config["config"]["label_smoothing"]), records),
            "Test accuracy, %": _svg(_draw_accuracy, records),
            "Images per second": _svg(_draw_throughput, records),
        },
        classes=test.classes,
        class_accuracies=test.class_accuracies(),
        confusion=test.confusion().tolist(),
        confusion_picture=_svg(_draw_confusion, test, (8, 7)) if len(test.classes) > MANY_CLASSES else "",
        wrong=wrong,
        wrong_total=test.total - test.correct,
        settings=config["config"] | {key: value for key, value in config.items() if key not in ("config", "starts")},
    )


def _svg(draw: Callable[[Axes, T], None], content: T, size: tuple[float, float] = (5.6, 2.7)) -> str:
    """Return a chart of `size`, in inches, as an SVG element in the page's colours."""
    figure = Figure(figsize=size, layout="constrained")
    draw(figure.subplots(), content)
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg[svg.index("<svg") :]


def _png(image: Tensor) -> str:
    file = io.BytesIO()
    Image.fromarray(image.cpu().permute(1, 2, 0).numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _figure(records: Records, result: dict[str, Any], config: dict[str, Any], test: Evaluation) -> Figure:
    """Return report.png: loss and accuracy over the run, accuracy of each class, confusion matrix."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08, rect=(0, 0, 1, 0.87))
    figure = Figure(figsize=(17, 6.6), layout=layout)
    axes = figure.subplot_mosaic("LCM;ACM", width_ratios=(1, 0.85, 1.15))
    _draw_losses(axes["L"], records, config["config"]["label_smoothing"])
    _draw_accuracy(axes["A"], records)
    axes["L"].set_title("Cross-entropy")
    axes["A"].set_title("Test accuracy, %")
    _draw_class_accuracies(axes["C"], test)
    _draw_confusion(axes["M"], test)
    classes = len(test.classes)
    axes["M"].set_title("Confusion matrix, " + ("images" if classes <= MANY_CLASSES else f"{classes:,} classes"))
    figure.text(0.012, 0.97, _headline(result), fontsize=17, fontweight="bold", va="top")
    figure.text(0.012, 0.905, "   |   ".join(_facts(result)), fontsize=10.5, color=_SOFT, va="top")
    if result["dataset"] == "synthetic":
        figure.text(
            0.988, 0.962, "SYNTHETIC DATASET, NOT CIFAR-10", fontsize=12, fontweight="bold", color="white",
            ha="right", va="top", bbox={"boxstyle": "round,pad=0.5", "facecolor": "#b3261e", "edgecolor": "none"},
        )  # fmt: skip
    return figure


def _plot(axes: Axes, records: Records, name: str, scale: float = 1, **style: Any) -> None:
    points = series(records, name)
    if len(points) == 1:
        style["marker"] = "o"  # a line needs two points to be seen
    axes.plot([step for step, _ in points], [scale * value for _, value in points], markersize=4, **style)
    axes.set_xlim(left=0)
    axes.set_xlabel("optimizer step")
    axes.locator_params(axis="x", nbins=6)  # room for the larger text on a phone
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _draw_losses(axes: Axes, records: Records, smoothing: float) -> None:
    training = f"training, with label smoothing {smoothing:g}" if smoothing else "training"  # which the test has not
    _plot(axes, records, "train/loss", color=_TRAIN, label=training)
    _plot(axes, records, "test/loss", color=_TEST, marker="o", label="test")
    axes.legend(frameon=False)


def _draw_accuracy(axes: Axes, records: Records) -> None:
    _plot(axes, records, "test/accuracy", scale=100, color=_TEST, marker="o")
    axes.set_ylim(0, 100)


def _draw_throughput(axes: Axes, records: Records) -> None:
    _plot(axes, records, "train/images_per_second", color=_TRAIN)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")


def _draw_class_accuracies(axes: Axes, test: Evaluation) -> None:
    accuracies = {name: value for name, value in test.class_accuracies().items() if math.isfinite(value)}
    title = "Accuracy of each class, %"
    if len(accuracies) > MANY_CLASSES:
        half = MANY_CLASSES // 2
        title = f"The {half} lowest and {half} highest of {len(accuracies)} classes, %"
        lowest, highest = test.lowest_and_highest(half)
        accuracies = lowest | highest
    bars = axes.barh(list(accuracies), [100 * value for value in accuracies.values()], color=_TRAIN, height=0.7)
    axes.bar_label(bars, fmt="%.1f", padding=4, fontsize=9, color=_INK)
    axes.set(title=title, xlim=(0, 100))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_axisbelow(True)


def _draw_confusion(axes: Axes, test: Evaluation) -> None:
    confusion, n = test.confusion(), len(test.classes)
    shares = confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    if n <= MANY_CLASSES:
        for i, row in enumerate(confusion.tolist()):
            for j, count in enumerate(row):
                color = "white" if shares[i, j] > 0.65 else _INK if count else "#c4ccd4"
                weight = "bold" if i == j else "normal"
                axes.text(j, i, f"{count}", ha="center", va="center", fontsize=8.5, color=color, fontweight=weight)
    named = range(0, n, math.ceil(n / MANY_CLASSES))
    names = [test.classes[k] for k in named]
    axes.set_xticks(named, names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(named, names)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
