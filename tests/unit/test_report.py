"""report.png, drawn from the records in a run's folder."""

import json
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from cifar import report
from cifar.datasets import CLASSES
from cifar.evaluation import Evaluation

LABELS = torch.arange(1000) % 10


@pytest.fixture
def test():
    predicted = torch.where(torch.arange(1000) % 3 == 0, (LABELS + 1) % 10, LABELS)
    return Evaluation(0.7, LABELS, predicted, torch.full((1000,), 0.5, dtype=torch.float64))


def result(**changes):
    return {
        "recipe": "wide", "dataset": "cifar10", "model": "net-wide", "steps": 40, "world_size": 2, "seed": 0,
        "global_batch_size": 500, "precision": "fp32", "device": "cpu", "train_seconds": 71.0,
        "images_per_second": 1055.0, "test_accuracy": 0.666, "test_correct": 666, "test_total": 1000, **changes,
    }  # fmt: skip


def log(step, loss):
    return {"step": step, "epoch": 1, "train/loss": loss, "train/lr": 0.1}


def epoch(step, loss, accuracy):
    classes = {f"test_class/{name}": accuracy for name in CLASSES}
    return {"step": step, "test/loss": loss, "test/accuracy": accuracy, **classes}


WHOLE = [log(10, 2.3), log(20, 2.0), epoch(20, 1.9, 0.4), log(30, 1.8), log(40, 1.5), epoch(40, 1.4, 0.666)]


def draw(run_dir, test, records, **changes):
    """The pixels of the report, uint8 [height, width, 3]."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    (run_dir / "result.json").write_text(json.dumps(result(**changes)))
    path = report.draw_report(run_dir, test)
    assert path == run_dir / "report.png"
    assert sorted(file.name for file in run_dir.iterdir()) == ["metrics.jsonl", "report.png", "result.json"]
    picture = Image.open(path)
    assert picture.format == "PNG"
    return np.array(picture.convert("RGB"))


def amount(pixels, color):
    """Pixels that have about the `color`, "#rrggbb"."""
    wanted = np.array([int(part, 16) for part in re.findall("..", color[1:])])
    return int((np.abs(pixels.astype(int) - wanted).max(2) < 40).sum())


def panels(pixels):
    """Whether each third of the picture, below its head, holds something besides white."""
    body = pixels[pixels.shape[0] // 5 :]
    return [(third < 200).any(2).mean() > 0.005 for third in np.array_split(body, 3, axis=1)]


def test_the_report_is_a_picture_of_three_panels(tmp_path, test):
    pixels = draw(tmp_path, test, WHOLE)
    assert 500 < pixels.shape[0] < 1500
    assert 1200 < pixels.shape[1] < 3000
    assert panels(pixels) == [True] * 3
    assert amount(pixels, report._TRAIN) > 500
    assert amount(pixels, report._TEST) > 500
    assert (tmp_path / "report.png").stat().st_size < 500_000


def test_it_is_drawn_from_the_records(tmp_path, test):
    whole = draw(tmp_path / "a", test, WHOLE)
    other = draw(tmp_path / "b", test, [*WHOLE[:-1], epoch(40, 1.4, 0.5)])
    width = whole.shape[1] // 3
    assert np.array_equal(whole[:, :width], other[:, :width])  # the losses are the same
    assert not np.array_equal(whole[:, width : 2 * width], other[:, width : 2 * width])


def test_the_stand_in_is_marked_in_red(tmp_path, test):
    real, stand_in = draw(tmp_path / "a", test, WHOLE), draw(tmp_path / "b", test, WHOLE, dataset="synthetic")
    head = real.shape[0] // 6
    assert amount(real[:head], "#b3261e") == 0
    assert amount(stand_in[:head], "#b3261e") > 5000


def test_a_single_log_point_and_epoch_are_seen(tmp_path, test):
    pixels = draw(tmp_path, test, [log(8, 2.3), epoch(8, 2.2, 0.2)], steps=8, world_size=1)
    left = pixels[pixels.shape[0] // 5 :, : pixels.shape[1] // 3]
    assert amount(left, report._TRAIN) > 60  # more than the line in the legend: a dot
    assert amount(left, report._TEST) > 60


@pytest.mark.parametrize(
    "records",
    [
        [],
        [log(1, float("nan")), epoch(1, float("inf"), 0.1)],
        [{"step": 1}, {"step": 2, "train/loss": 1.0}, {"step": 3, "test/accuracy": 0.5}],
        [*WHOLE[:4], *[log(40, 1.5), epoch(40, 1.4, 0.6)], log(50, 1.2)],  # resumed, and ended before its epoch did
    ],
    ids=["nothing", "not finite", "gaps", "resumed"],
)
def test_what_is_missing_is_left_out(tmp_path, test, records):
    assert panels(draw(tmp_path, test, records))[2]


def test_a_line_that_a_full_disk_cut_short_is_left_out(tmp_path, test):
    wanted = draw(tmp_path, test, WHOLE)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "train/lo')
    assert np.array_equal(np.array(Image.open(report.draw_report(tmp_path, test)).convert("RGB")), wanted)


def test_a_class_without_images_does_no_harm(tmp_path):
    labels = LABELS % 9
    assert panels(draw(tmp_path, Evaluation(1.0, labels, labels, torch.ones(1000).double()), WHOLE))[2]


@pytest.mark.parametrize(
    "values", [[0.0] * 11, [100.0] * 11, [50.0, 50.5, 51.0], [3.0, 90.0], [], [0, 1, 2, 50, 51, 97, 98, 99, 99, 100]]
)
def test_labels_keep_their_distance_and_order(values):
    heights = report._spread(values, gap=4.6)
    assert len(heights) == len(values)
    assert all(b - a >= 4.6 - 1e-9 for a, b in pairwise(heights))
    assert all(0 <= height <= 100 for height in heights)


def test_labels_that_have_room_stay_where_they_are():
    assert report._spread([20.0, 50.0, 80.0], gap=4.6) == [20.0, 50.0, 80.0]
