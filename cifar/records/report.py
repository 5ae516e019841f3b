"""The report of a finished run: index.html, which needs no other file, and report.png, with the same charts."""

import base64
import io
import math
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image
from torch import Tensor

from cifar.evaluation import MANY_CLASSES, Evaluation
from cifar.files import read_json, write_atomically
from cifar.records.metrics import Series, read_metrics, series
from cifar.records.plotting import Axes, Figure, LinearSegmentedColormap, default_style, drawable

_WRONG_IMAGES = 36

_INK, _SOFT, _LINE, _TRAIN, _TEST, _ALARM = "#1d2733", "#5b6875", "#d9dfe5", "#1f6fb4", "#c9480f", "#b3261e"
_STYLE: Any = {
    "font.size": 10, "legend.fontsize": 9, "legend.frameon": False,
    "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": _LINE,
    "text.color": _INK, "axes.titlecolor": _INK, "axes.labelcolor": _SOFT, "axes.edgecolor": _SOFT,
    "xtick.color": _SOFT, "ytick.color": _SOFT,
    "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.1,
    "svg.fonttype": "none", "svg.hashsalt": "cifar-ddp",
}  # fmt: skip


def write_report(run_dir: Path, test: Evaluation, images: Tensor) -> None:
    """Write index.html and report.png from the records in `run_dir` and its last evaluation.

    `images` is the test set, uint8 [n, 3, size, size].
    """
    result, facts = read_json(run_dir / "result.json"), read_json(run_dir / "config.json")
    config = facts.pop("config")
    facts.pop("starts")
    is_synthetic = result["dataset"] == "synthetic"
    headline = f"Test accuracy {100 * test.accuracy:.2f} %: {test.correct:,} of {test.total:,} test images"
    summary = _summary(result)
    source = Path(__file__).with_name("report.html.jinja").read_text()
    template = jinja2.Template(source, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    with default_style(_STYLE):
        drawn = replace(test, classes=drawable(test.classes))
        figure = _figure(read_metrics(run_dir), config["label_smoothing"], drawn)
        page = template.render(
            name=run_dir.resolve().name,
            headline=headline,
            summary=summary,
            is_synthetic=is_synthetic,
            charts=_svg(figure),
            wrong=[_wrong_image(test, images, i) for i in test.most_confidently_wrong(_WRONG_IMAGES)],
            wrong_total=test.total - test.correct,
            lists={"Accuracy of each class": _class_accuracies(test, drawn.classes), "Configuration": config | facts},
        )
        write_atomically(run_dir / "index.html", lambda file: file.write(page.encode()))
        # The picture has to say what the page says around the charts.
        title, color = (f"SYNTHETIC DATASET, NOT CIFAR-10. {headline}", _ALARM) if is_synthetic else (headline, _INK)
        figure.suptitle(title, x=0.01, ha="left", fontsize=17, fontweight="bold", color=color)
        if unknown := [name for name in drawn.classes if name not in test.classes]:
            summary += f"; without a font for the names of {', '.join(unknown)}: see index.html"
        figure.supxlabel(textwrap.fill(summary, 150), x=0.01, ha="left", fontsize=10, color=_SOFT)
        write_atomically(run_dir / "report.png", lambda file: figure.savefig(file, format="png", dpi=110))


def _summary(result: dict[str, Any]) -> str:
    tta, size = result.get("test_accuracy_tta"), result["image_size"]
    with_tta = "" if tta is None else f"{100 * tta:.2f} % with test-time augmentation ({result['tta']}), "
    return (
        f"{with_tta}dataset {result['dataset']}, {size} x {size}, recipe {result['recipe']}, model {result['model']}, "
        f"{result['steps']:,} steps of {result['global_batch_size']:,} images, "
        f"{result['trained_on']}, {result['precision']}, seed {result['seed']}, "
        f"{result['train_seconds']:,.0f} s of training, {result['images_per_second']:,.0f} images/s"
    )


def _class_accuracies(test: Evaluation, drawn: tuple[str, ...]) -> dict[str, str]:
    """Return the accuracy of each class in words; before its name stands its name in the charts, if that is another."""
    texts = {}
    for (name, value), other in zip(test.class_accuracies().items(), drawn, strict=True):
        key = name if name == other else f"{other}: {name}"
        texts[key] = f"{100 * value:.1f} %" if math.isfinite(value) else "no images"
    return texts


def _wrong_image(test: Evaluation, images: Tensor, index: int) -> dict[str, Any]:
    file = io.BytesIO()
    Image.fromarray(images[index].cpu().permute(1, 2, 0).numpy()).save(file, "PNG")
    return {
        "index": index,
        "png": base64.b64encode(file.getvalue()).decode(),
        "label": test.classes[test.labels[index]],
        "predicted": test.classes[test.predicted[index]],
        "confidence": float(test.confidence[index]),
    }


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    return svg[svg.index("<svg") :]  # without the XML declaration


def _figure(records: list[dict[str, Any]], smoothing: float, test: Evaluation) -> Figure:
    """Return the charts: loss, accuracy and throughput over the run, accuracy of each class, confusion matrix."""
    figure = Figure(figsize=(12.5, 9), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 2)).flat
    losses, accuracy, throughput = above.subplots(1, 3)
    training = f"training, with label smoothing {smoothing:g}" if smoothing else "training"  # which the test has not
    _plot(losses, "Cross-entropy", series(records, "train/loss"), color=_TRAIN, label=training)
    _plot(losses, "Cross-entropy", series(records, "test/loss"), color=_TEST, marker="o", label="test")
    losses.legend()
    percents = [(step, 100 * value) for step, value in series(records, "test/accuracy")]
    _plot(accuracy, "Test accuracy, %", percents, color=_TEST, marker="o")
    accuracy.set_ylim(0, 100)
    _plot(throughput, "Images per second", series(records, "train/images_per_second"), color=_TRAIN)
    throughput.set_ylim(0, 1.1 * throughput.get_ylim()[1])
    throughput.yaxis.set_major_formatter("{x:,g}")
    classes, matrix = below.subplots(1, 2)
    _draw_class_accuracies(classes, test)
    _draw_confusion(matrix, test)
    return figure


def _plot(axes: Axes, title: str, points: Series, **style: Any) -> None:
    if len(points) == 1:
        style["marker"] = "o"  # a line needs two points to be seen
    axes.plot([step for step, _ in points], [value for _, value in points], markersize=4, **style)
    axes.set(title=title, xlabel="optimizer step")
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", integer=True)
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _draw_class_accuracies(axes: Axes, test: Evaluation) -> None:
    accuracies = {name: value for name, value in test.class_accuracies().items() if math.isfinite(value)}
    title = "Accuracy of each class, %"
    if len(accuracies) > MANY_CLASSES:
        half = MANY_CLASSES // 2
        title = f"The {half} lowest and {half} highest of {len(accuracies)} classes, %"
        accuracies = test.lowest_and_highest(half)
    percents = [100 * value for value in accuracies.values()]
    bars = axes.barh(range(len(percents)), percents, 0.7, tick_label=list(map(_short, accuracies)), color=_TRAIN)
    axes.bar_label(bars, fmt="%.1f", padding=4, fontsize=9, color=_INK)
    axes.set(title=title, xlim=(0, 100))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_axisbelow(True)


def _draw_confusion(axes: Axes, test: Evaluation) -> None:
    """Draw the confusion matrix: the darker, the larger the share of the true class's images."""
    confusion, n = test.confusion(), len(test.classes)
    shares = confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    color_map = LinearSegmentedColormap.from_list("", [f"{_TRAIN}00", _TRAIN])  # from transparent, on any page
    axes.imshow(shares.numpy(), cmap=color_map, vmin=0, vmax=1, interpolation="none")
    title = f"Confusion matrix, {n:,} classes"
    if n <= MANY_CLASSES:
        title = "Confusion matrix, images"
        for i, row in enumerate(confusion.tolist()):
            for j, count in enumerate(row):
                color = _INK if count else _LINE
                if shares[i, j] > 0.8:
                    color = "white"
                weight = "bold" if i == j else "normal"
                axes.text(j, i, f"{count}", ha="center", va="center", fontsize=8.5, color=color, fontweight=weight)
    step = math.ceil(n / MANY_CLASSES)
    names = [_short(name) for name in test.classes[::step]]
    axes.set_xticks(range(0, n, step), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(0, n, step), names)
    axes.set(title=title, xlabel="predicted class", ylabel="true class")
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _short(name: str) -> str:
    """Return a class name as it has room beside a chart."""
    return name if len(name) <= 18 else f"{name[:17]}…"
