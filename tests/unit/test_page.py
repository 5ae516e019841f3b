"""index.html and its charts, made from the records in a run's folder."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from cifar.chart import Line, chart, nice_ticks
from cifar.page import write_page
from tests.test_report import LABELS, WHOLE, result
from tests.test_report import test as test  # its fixture

IMAGES = torch.randint(0, 256, (1000, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def page(run_dir, test, records=WHOLE, images=IMAGES, name="<a & b>", **changes):
    run_dir = run_dir / name
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    (run_dir / "result.json").write_text(json.dumps(result(**changes)))
    (run_dir / "config.json").write_text(json.dumps({"config": {"lr": 0.05, "model": "<net>"}, "torch": "2.15"}))
    return write_page(run_dir, test, images).read_text()


def test_is_well_formed_and_needs_nothing_else(tmp_path, test):
    text = page(tmp_path, test)
    open_tags = []

    class Balanced(HTMLParser):
        def handle_starttag(self, tag, attrs):
            for name, value in attrs:
                assert name not in ("src", "href") or value.startswith("data:"), value
            if tag not in ("meta", "img", "line", "circle", "polyline", "!doctype"):
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

        def handle_startendtag(self, tag, attrs):
            pass

    Balanced().feed(text)
    assert not open_tags
    assert "http" not in text
    assert "&lt;a &amp; b&gt;" in text
    assert "&lt;net&gt;" in text
    assert "<script" not in text


def test_says_what_the_run_did(tmp_path, test):
    text = page(tmp_path, test, test_accuracy_tta=0.7, tta="crop")
    assert "66.60 % of 1,000 test images" in text
    assert "70.00 % with test-time augmentation (crop)" in text
    assert "40 steps of 500 images" in text
    assert "<td>lr</td><td>0.05</td>" in text
    assert "stand-in" not in text
    for i, row in enumerate(test.confusion().tolist()):
        cells = [int(cell) for cell in re.findall(r">(\d+)</td>", text.split("<tbody>")[1].split("</tr>")[i])]
        assert cells == row


def test_warns_of_the_stand_in(tmp_path, test):
    assert "Built-in stand-in images, not CIFAR-10" in page(tmp_path, test, dataset="synthetic")


def test_shows_the_wrong_images_bit_by_bit(tmp_path, test):
    text = page(tmp_path, test)
    found = re.findall(r'base64,([^"]+)" alt="test image (\d+), a (\w+)">', text)
    assert [int(i) for _, i, _ in found] == test.most_confidently_wrong(36)
    for content, i, _ in found[:3]:
        pixels = np.array(Image.open(io.BytesIO(base64.b64decode(content))))
        assert np.array_equal(pixels, IMAGES[int(i)].permute(1, 2, 0).numpy())


def test_without_records_and_without_mistakes(tmp_path, test):
    from cifar.evaluation import Evaluation

    right = Evaluation(0.1, LABELS, LABELS, test.confidence)
    text = page(tmp_path, right, records=[])
    assert "no records" in text
    assert "Most confidently wrong" not in text


def test_a_chart_puts_points_where_they_belong():
    text = chart([Line("one", [(0, 0.0), (50, 1.0), (100, 0.5)])], low=0, high=1)
    (path,) = re.findall(r'points="([^"]+)"', text)
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, spot.split(","))) for spot in path.split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(2 * (y0 - y2), abs=0.2)
    assert y0 > y2 > y1, "SVG counts from the top"


def test_a_single_point_can_be_seen():
    assert "<circle" in chart([Line("one", [(3, 2.0)])])


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0.41, 2.3, [0, 0.5, 1, 1.5, 2, 2.5]),
        (0, 4100, [0, 1000, 2000, 3000, 4000, 5000]),
    ],
)
def test_ticks_are_round_and_take_all_in(low, high, ticks):
    assert nice_ticks(low, high) == ticks
