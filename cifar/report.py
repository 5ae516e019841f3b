"""The picture of a finished run: report.png."""

import json
from pathlib import Path
from typing import Any

from cifar.data import CLASSES
from cifar.evaluation import Evaluation
from cifar.run import write_atomically


def draw_report(run_dir: Path, test: Evaluation) -> Path:
    """Draw loss, accuracy and confusion matrix from the records in `run_dir` and from `test`, its last evaluation.

    Returns:
        The path of report.png.

    Raises:
        OSError: it can't be written.
    """
    from matplotlib.figure import Figure  # no pyplot: nothing here needs a window or global state

    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((run_dir / "result.json").read_text())
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    losses, accuracies, confusion = figure.subplots(1, 3)
    figure.suptitle(_title(result))
    _draw_losses(losses, records)
    _draw_accuracies(accuracies, records, test)
    _draw_confusion(confusion, test)
    path = run_dir / "report.png"
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
    return path


def _title(result: dict[str, Any]) -> str:
    title = (
        f"{result['recipe']}: {result['model']}, {result['steps']:,} steps of {result['global_batch_size']} images, "
        f"{result['world_size']} x {result['device']} {result['precision']}, seed {result['seed']}, "
        f"{result['train_seconds']:.0f} s\ntest accuracy {100 * result['test_accuracy']:.2f} % "
        f"({result['test_correct']:,} of {result['test_total']:,})"
    )
    return title + ("  -  ON THE BUILT-IN STAND-IN, NOT CIFAR-10" if result["dataset"] == "synthetic" else "")


def _series(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = [(record["step"], record[name]) for record in records if name in record]
    return [step for step, _ in found], [value for _, value in found]


def _draw_losses(axes: Any, records: list[dict[str, Any]]) -> None:
    axes.plot(*_series(records, "train/loss"), label="training, running mean", linewidth=1.2)
    axes.plot(*_series(records, "test/loss"), "o-", label="test")
    axes.set(title="Cross-entropy", xlabel="optimizer step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_accuracies(axes: Any, records: list[dict[str, Any]], test: Evaluation) -> None:
    steps, values = _series(records, "test/accuracy")
    axes.plot(steps, [100 * value for value in values], "ko-", label="all classes", linewidth=2, zorder=3)
    for name in CLASSES:
        steps, values = _series(records, f"test_class/{name}")
        axes.plot(steps, [100 * value for value in values], ".-", label=name, linewidth=0.9, alpha=0.8)
    axes.set(title="Test accuracy", xlabel="optimizer step", ylabel="%", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(ncols=3, fontsize=8, loc="lower right")


def _draw_confusion(axes: Any, test: Evaluation) -> None:
    confusion = test.confusion()
    shares = confusion.double() / confusion.sum(1, keepdim=True)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(confusion.tolist()):
        for j, count in enumerate(row):
            color = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, str(count), ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(CLASSES)), CLASSES, rotation=45, ha="right")
    axes.set_yticks(range(len(CLASSES)), CLASSES)
    axes.set(title="Confusion matrix (images)", xlabel="predicted", ylabel="class")
