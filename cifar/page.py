"""The page of a finished run: index.html, which needs no server and no other file."""

import base64
import html
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from cifar.chart import Line, chart
from cifar.datasets import CLASSES
from cifar.evaluation import Evaluation
from cifar.files import write_atomically
from cifar.metrics import read_metrics, series

_WRONG_IMAGES = 36

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5b6875; --line: #d9dfe5; --card: #fff; --back: #f4f6f8;
  --one: #1f6fb4; --two: #c9480f; --cell: 31 111 180; --alarm: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf0; --soft: #9aa7b4; --line: #323d48; --card: #1a222b;
  --back: #11171d; --one: #64aef0; --two: #ff9a5c; --cell: 80 160 235; --alarm: #d94a40; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 1.7rem; margin: 0 0 4px; line-height: 1.2; }
h2 { font-size: 1.02rem; margin: 0 0 10px; }
p { margin: 0; color: var(--soft); }
.alarm { background: var(--alarm); color: #fff; border-radius: 8px; padding: 8px 12px; margin-top: 12px;
  font-weight: 600; }
.cards { display: grid; gap: 14px; margin-top: 18px; grid-template-columns: repeat(2, minmax(0, 1fr)); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 14px 16px;
  min-width: 0; }
.wide { grid-column: 1 / -1; }
.scroll { overflow-x: auto; }
svg { width: 100%; height: auto; display: block; overflow: visible; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.grid { stroke: var(--line); } .one { stroke: var(--one); } .two { stroke: var(--two); }
circle.one { fill: var(--one); } circle.two { fill: var(--two); }
.key { display: inline-block; width: 14px; height: 3px; border-radius: 2px; vertical-align: middle; margin-right: 6px; }
.keys { font-size: .85rem; color: var(--soft); margin-bottom: 6px; } .keys span { margin-right: 14px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.confusion { font-size: .8rem; width: 100%; }
.confusion th { font-weight: 400; color: var(--soft); padding: 2px 5px; text-align: right; }
.confusion th:first-child { position: sticky; left: 0; z-index: 1; background: var(--card); }
.confusion thead th { text-align: center; }
.confusion td { text-align: center; padding: 4px 2px; min-width: 30px; border: 1px solid var(--card); }
.confusion .right { font-weight: 700; } .confusion .none { color: var(--soft); opacity: .55; }
.confusion .full { color: #fff; }
.bars { display: grid; grid-template-columns: auto 1fr auto; gap: 7px 10px; align-items: center; font-size: .9rem; }
.bar { height: 12px; background: var(--line); border-radius: 6px; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--one); }
.wrong { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 12px; }
figure { margin: 0; font-size: .78rem; line-height: 1.25; }
figure img { width: 100%; image-rendering: pixelated; border-radius: 6px; display: block; margin-bottom: 4px; }
figure s { color: var(--two); text-decoration: none; }
.facts { width: 100%; font-size: .85rem; }
.facts td { padding: 3px 0; border-top: 1px solid var(--line); overflow-wrap: anywhere; }
.facts td:first-child { color: var(--soft); padding-right: 14px; white-space: nowrap; }
.columns { columns: 2; column-gap: 32px; } .columns table { break-inside: auto; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 760px) { .cards { grid-template-columns: minmax(0, 1fr); } h1 { font-size: 1.35rem; }
  .columns { columns: 1; } section { padding: 12px; } svg text { font-size: 17px; }
  .wrong { grid-template-columns: repeat(auto-fill, minmax(88px, 1fr)); } }
"""

_LEGEND = (
    '<div class="keys"><span><i class="key" style="background: var(--one)"></i>training</span>'
    '<span><i class="key" style="background: var(--two)"></i>test</span></div>'
)


def write_page(run_dir: Path, test: Evaluation, images: Tensor) -> Path:
    """Write index.html from the records in `run_dir` and from `test`, its last evaluation.

    Args:
        images: the test set, uint8 [n, 3, 32, 32].

    Returns:
        The path of index.html.

    Raises:
        OSError: it can't be written.
    """
    records = read_metrics(run_dir)
    result = json.loads((run_dir / "result.json").read_text())
    config = json.loads((run_dir / "config.json").read_text())
    title = f"{run_dir.resolve().name}: {100 * result['test_accuracy']:.2f} %"
    body = "".join(_sections(run_dir.resolve().name, records, result, config, test, images))
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style></head>\n'
        f"<body><main>{body}</main></body></html>\n"
    )
    path = run_dir / "index.html"
    write_atomically(path, lambda file: file.write(page.encode()))
    return path


def _sections(
    name: str,
    records: list[dict[str, Any]],
    result: dict[str, Any],
    config: dict[str, Any],
    test: Evaluation,
    images: Tensor,
) -> Iterable[str]:
    stand_in = result["dataset"] == "synthetic"
    yield f"<h1>{100 * result['test_accuracy']:.2f} % of {result['test_total']:,} test images</h1>"
    count = result["world_size"]
    facts = [
        f"recipe {result['recipe']}", f"net {result['model']}", f"{result['steps']:,} steps of "
        f"{result['global_batch_size']:,} images", f"{count} process{'es' if count > 1 else ''} on {result['device']}",
        result["precision"], f"seed {result['seed']}", f"{result['train_seconds']:,.0f} s of training",
        f"{result['images_per_second']:,.0f} images/s",
    ]  # fmt: skip
    if result.get("test_accuracy_tta") is not None:
        facts.insert(0, f"{100 * result['test_accuracy_tta']:.2f} % with test-time augmentation ({result['tta']})")
    yield f"<p>{html.escape(name)}: {html.escape(', '.join(facts))}</p>"
    if stand_in:
        yield '<p class="alarm">Built-in stand-in images, not CIFAR-10: no number here compares with CIFAR-10\'s</p>'
    yield '<div class="cards">'
    train, tests = series(records, "train/loss"), series(records, "test/loss")
    yield _card("Cross-entropy", _LEGEND + chart([Line("one", train), Line("two", tests, dots=True)]))
    accuracy = [(step, 100 * value) for step, value in series(records, "test/accuracy")]
    yield _card("Test accuracy, %", chart([Line("two", accuracy, dots=True)], low=0, high=100))
    yield _card("Images per second", chart([Line("one", series(records, "train/images_per_second"))], low=0))
    yield _card("Accuracy of each class, %", _bars(test.class_accuracies()))
    yield _card("Confusion matrix: true class (rows), predicted class (columns), images", _confusion(test), "wide")
    wrong = test.most_confidently_wrong(_WRONG_IMAGES)
    if wrong:
        title = f"Most confidently wrong: {len(wrong)} of {test.total - test.correct:,} misclassified images"
        yield _card(title, _pictures(wrong, test, images), "wide")
    settings = {**config["config"], **{key: value for key, value in config.items() if key != "config"}}
    yield _card(
        "", f'<details><summary>Configuration</summary><div class="columns">{_facts(settings)}</div></details>', "wide"
    )
    yield "</div>"


def _card(title: str, content: str, extra: str = "") -> str:
    heading = f"<h2>{html.escape(title)}</h2>" if title else ""
    return f'<section class="{extra}">{heading}{content}</section>\n'


def _bars(accuracies: Sequence[float]) -> str:
    rows = (
        f'<span>{name}</span><span class="bar"><i style="width: {100 * value:.1f}%"></i></span>'
        f"<span>{100 * value:.1f}</span>"
        for name, value in zip(CLASSES, accuracies, strict=True)
    )
    return f'<div class="bars">{"".join(rows)}</div>'


def _confusion(test: Evaluation) -> str:
    confusion = test.confusion().tolist()
    head = "".join(f"<th>{name}</th>" for name in CLASSES)
    rows = []
    for i, (name, row) in enumerate(zip(CLASSES, confusion, strict=True)):
        cells = []
        for j, count in enumerate(row):
            share = count / max(1, sum(row))
            kind = " ".join(["right"] * (i == j) + ["none"] * (count == 0) + ["full"] * (share > 0.5))
            cells.append(f'<td class="{kind}" style="background: rgb(var(--cell) / {share:.2f})">{count}</td>')
        rows.append(f"<tr><th>{name}</th>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table class="confusion"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _pictures(indices: Iterable[int], test: Evaluation, images: Tensor) -> str:
    figures = []
    for i in indices:
        truth, guess = CLASSES[test.labels[i]], CLASSES[test.predicted[i]]
        figures.append(
            f'<figure><img src="data:image/png;base64,{_png(images[i])}" alt="test image {i}, a {truth}">'
            f"{truth}, taken for <s>{guess}</s> ({100 * float(test.confidence[i]):.0f} %)</figure>"
        )
    return f'<div class="wrong">{"".join(figures)}</div>'


def _png(image: Tensor) -> str:
    file = io.BytesIO()
    Image.fromarray(image.cpu().permute(1, 2, 0).numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _facts(facts: dict[str, Any]) -> str:
    rows = (f"<tr><td>{html.escape(key)}</td><td>{html.escape(str(value))}</td></tr>" for key, value in facts.items())
    return f'<table class="facts">{"".join(rows)}</table>'
