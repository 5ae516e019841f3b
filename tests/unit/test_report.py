"""index.html and report.png from the records of a run directory."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from cifar.evaluation import Evaluation
from cifar.report import write_report

IMAGES = torch.randint(0, 256, (300, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
RECORDS = [
    {"step": 10, "train/loss": 2.3, "train/images_per_second": 900.0},
    {"step": 20, "train/loss": 2.0, "train/images_per_second": 1000.0},
    {"step": 20, "test/loss": 1.9, "test/accuracy": 0.4},
]


def evaluation(classes):
    labels = torch.arange(300) % len(classes)
    predicted = torch.where(torch.arange(300) % 3 == 0, (labels + 1) % len(classes), labels)
    return Evaluation(0.7, labels, predicted, torch.linspace(0.5, 1, 300, dtype=torch.float64), tuple(classes))


def report(run_dir, test, records=RECORDS, **changes):
    """Write the report of a made-up run; return the page and the picture's pixels."""
    run_dir.mkdir()
    result = {
        "recipe": "wide", "dataset": "cifar10", "model": "net-wide", "steps": 40, "world_size": 2, "seed": 0,
        "global_batch_size": 500, "precision": "fp32", "device": "cpu", "train_seconds": 71.0,
        "images_per_second": 1055.0, "test_accuracy": 2 / 3, "test_correct": 200, "test_total": 300, **changes,
    }  # fmt: skip
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    (run_dir / "result.json").write_text(json.dumps(result))
    (run_dir / "config.json").write_text(json.dumps({"config": {"lr": 0.05, "model": "<net>"}, "torch": "2.15"}))
    write_report(run_dir, test, IMAGES)
    return (run_dir / "index.html").read_text(), np.array(Image.open(run_dir / "report.png").convert("RGB"))


def test_page_is_well_formed_and_self_contained(tmp_path):
    page, _ = report(tmp_path / "<a & b>", evaluation("xyz"))
    open_tags = []

    class Balanced(HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert all(value.startswith("data:") for name, value in attrs if name in ("src", "href"))
            if tag not in ("meta", "img"):
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

        def handle_startendtag(self, tag, attrs):
            assert all(value.startswith(("data:", "#")) for name, value in attrs if name.endswith(("src", "href")))

    Balanced().feed(page)
    assert not open_tags
    assert "<script" not in page
    assert "&lt;a &amp; b&gt;" in page
    assert "&lt;net&gt;" in page


def test_page_states_the_results(tmp_path):
    test = evaluation(["plane", "a <b>", "dog"])
    page, _ = report(tmp_path / "run", test, test_accuracy_tta=0.7, tta="crop")
    assert "Test accuracy 66.67 %: 200 of 300 test images" in page
    assert "70.00 % with test-time augmentation (crop)" in page
    assert "40 steps of 500 images" in page
    assert "<span>lr</span><span>0.05</span>" in page
    assert "Synthetic" not in page
    assert page.count("a &lt;b&gt;") >= 3, "class names are escaped: bars, confusion matrix, wrong pictures"
    cells = [int(cell) for cell in re.findall(r">(\d+)</td>", page)]
    assert cells == test.confusion().flatten().tolist()
    assert page.count("<svg") == 3
    assert "var(--train)" in page.split("<svg")[1], "charts follow the page's colour scheme"


def test_wrong_pictures_are_the_test_images(tmp_path):
    test = evaluation("xyz")
    page, _ = report(tmp_path / "run", test)
    found = re.findall(r'base64,([^"]+)" alt="test image (\d+), class (\w+)">', page)
    assert [int(i) for _, i, _ in found] == test.most_confidently_wrong(36)
    for content, i, name in found:
        pixels = np.array(Image.open(io.BytesIO(base64.b64decode(content))))
        assert np.array_equal(pixels, IMAGES[int(i)].permute(1, 2, 0).numpy())
        assert name == "xyz"[test.labels[int(i)]]


def test_synthetic_dataset_is_marked(tmp_path):
    _, plain = report(tmp_path / "real", evaluation("xyz"))
    page, marked = report(tmp_path / "synthetic", evaluation("xyz"), dataset="synthetic")
    assert "Synthetic dataset, not CIFAR-10" in page
    red = np.array([0xB3, 0x26, 0x1E])
    assert not (plain == red).all(2).any()
    assert (marked == red).all(2).sum() > 1000


@pytest.mark.parametrize("count", [2, 100])
def test_any_number_of_classes(tmp_path, count):
    page, _ = report(tmp_path / "run", evaluation([f"$class {i}" for i in range(count)]))
    assert f"$class {count - 1}" in page


def test_no_records_and_no_mistakes(tmp_path):
    right = evaluation("xyz")
    page, _ = report(tmp_path / "run", Evaluation(0.1, right.labels, right.labels, right.confidence, right.classes), [])
    assert "Most confidently wrong" not in page


def test_matplotlib_settings_of_the_user_do_not_matter(tmp_path):
    page, picture = report(tmp_path / "a", evaluation("xyz"))
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30, "svg.fonttype": "path"}):
        other_page, other_picture = report(tmp_path / "b", evaluation("xyz"))
    assert np.array_equal(picture, other_picture)
    assert page.split("<svg")[1:] == other_page.split("<svg")[1:]
