"""python -m cifar.compare: several runs as a table and a picture."""

import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

from cifar.compare import main, read_run, table
from cifar.errors import UserError


def make(folder, name, accuracies, dataset="cifar10", lr_scaling=None, lr_batch_size=100, **result):
    """A run of 10 steps an epoch, at 50 and 100 images/s; finished if there is a `result`, by default of all steps."""
    run_dir = folder / name
    run_dir.mkdir()
    config = {"global_batch_size": 100, "lr": 0.1, "seed": 3, "lr_scaling": lr_scaling, "lr_batch_size": lr_batch_size}
    (run_dir / "config.json").write_text(json.dumps({"config": config, "world_size": 2, "dataset": dataset}))
    lines = []
    for epoch, accuracy in enumerate(accuracies, 1):
        lines.append({"step": 10 * epoch - 5, "train/images_per_second": 50.0})
        lines.append({"step": 10 * epoch, "train/images_per_second": 100.0})
        lines.append({"step": 10 * epoch, "test/accuracy": accuracy})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if result:
        (run_dir / "result.json").write_text(json.dumps({"dataset": dataset, "steps": 10 * len(accuracies), **result}))
    return run_dir


@pytest.mark.parametrize("earlier", [{}, {"steps": 10, "train_seconds": 1.0, "test_accuracy_tta": 0.9}])
def test_reads_accuracy_over_seconds_and_images(tmp_path, earlier):
    """The result of a run that was continued since does not count."""
    run = read_run(make(tmp_path, "a", [0.5, 0.75], **earlier))
    # 500 images at 50/s and 500 at 100/s in each epoch.
    assert run.by_seconds == [(15.0, 0.5), (30.0, 0.75)]
    assert run.by_images == [(1000, 0.5), (2000, 0.75)]
    shown = [run.cells[name] for name in ("accuracy", "with TTA", "steps", "seconds", "first step", "run")]
    assert shown == ["75.00 %", "-", "20", "30.0", "-", "a (not finished)"]


def test_table_is_sorted_by_accuracy(tmp_path):
    runs = [
        read_run(make(tmp_path, "low", [0.4], train_seconds=14.0, test_accuracy=0.4)),  # of an older version
        read_run(make(tmp_path, "none", [])),
        read_run(make(tmp_path, "high", [0.9], train_seconds=16.0, first_step_seconds=1.5, test_accuracy_tta=0.92)),
        read_run(make(tmp_path, "scaled", [0.2], lr_scaling="linear", lr_batch_size=25)),
    ]
    head, high, low, scaled, none = table(runs)
    assert head.split()[0] == "accuracy"
    assert re.fullmatch(r" *90\.00 % +92\.00 % +16\.0 +1\.50 +62 .*  high", high)
    assert re.fullmatch(r" *40\.00 % +- +14\.0 +- .* 0\.1 .*  low", low)
    assert " 0.4 " in scaled, "the rate of the global batch"
    assert re.fullmatch(r" +- +- +- .*  none \(not finished\)", none)


def test_picture_and_table_of_a_directory_of_runs(tmp_path, capsys):
    (tmp_path / "sweep").mkdir()
    make(tmp_path / "sweep", r"$\b$", [0.3], dataset="synthetic")  # no TeX; not finished
    make(tmp_path / "sweep", "c", [0.4, 0.8], dataset="synthetic", train_seconds=1.0)
    out = tmp_path / "out.png"
    main([str(make(tmp_path, "a", [0.5])), str(tmp_path / "sweep"), "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[16] for line in lines[1:4]] == ["c", "a", r"$\b$"]
    assert lines[4:] == ["on the synthetic dataset, not on CIFAR-10: $\\b$, c", f"picture: {out}"]
    pixels = np.array(Image.open(out).convert("RGB"))
    for color in ((31, 119, 180), (255, 127, 14), (44, 160, 44)):
        assert (pixels == color).all(2).any(), "each run has a line"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"\xff"),
        ("config.json", b"[]"),
        ("config.json", b'{"config": {"global_batch_size": 100, "lr": "x", "seed": 3}, "world_size": 2}'),
        ("metrics.jsonl", None),
        ("metrics.jsonl", b'{"step": 1, "train/images_per_second": 0}'),
        ("result.json", b'{"dataset": "cifar1'),
        ("result.json", b'{"test_accuracy": 0.5}'),
    ],
)
def test_damaged_run_is_named_and_the_others_compared(tmp_path, capsys, name, content):
    path = make(tmp_path, "a", [0.5]) / name
    path.unlink(missing_ok=True)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    make(tmp_path, "b", [0.75])
    out = tmp_path / "out.png"
    with pytest.raises(UserError) as mistake:
        main([str(tmp_path), "--out", str(out)])
    assert str(mistake.value).startswith(f"the records in {path.parent} cannot be read: ")
    assert "\n" not in str(mistake.value)
    assert [line.split()[-3] for line in capsys.readouterr().out.splitlines()[1:-1]] == ["b"]
    assert out.exists()


def test_mistakes(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no run is named"):
        main([])
    with pytest.raises(UserError, match="is not a run directory"):
        main([str(tmp_path)])
    run_dir = make(tmp_path, "a", [0.3])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "cifar.records.plotting", raising=False)
    with pytest.raises(UserError, match=r"the picture cannot be written to .*out\.png: .*matplotlib"):
        main([str(run_dir), "--out", str(tmp_path / "out.png")])
