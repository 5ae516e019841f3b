"""index.html and report.png from the records of a run directory."""

import base64
import io
import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from cifar.evaluation import Evaluation
from cifar.records import plotting
from cifar.records.report import write_report

IMAGES = torch.randint(0, 256, (300, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
RECORDS = [
    {"step": 10, "train/loss": 2.3, "train/images_per_second": 900.0},
    {"step": 20, "train/loss": 2.0, "train/images_per_second": 1000.0},
    {"step": 20, "test/loss": 1.9, "test/accuracy": 0.4},
]
RED = (0xB3, 0x26, 0x1E)  # the warning in report.png


def evaluation(classes):
    labels = torch.arange(300) % len(classes)
    predicted = torch.where(torch.arange(300) % 3 == 0, (labels + 1) % len(classes), labels)
    confidence = torch.linspace(0.5, 1, 300, dtype=torch.float64)
    return Evaluation(torch.full((300,), 0.7), labels, predicted, confidence, tuple(classes))


def report(run_dir, test, records=RECORDS, smoothing=0.2, **changes):
    """Write the report of a made-up run; return the page and the picture's pixels."""
    run_dir.mkdir()
    result = {
        "recipe": "wide", "dataset": "cifar10", "model": "net-wide", "steps": 40, "seed": 0, "precision": "fp32",
        "global_batch_size": 500, "trained_on": "2 processes on cpu, then 1 process on cpu", "train_seconds": 71.0,
        "images_per_second": 1055.0, "image_size": 32, **changes,
    }  # fmt: skip
    config = {"lr": 0.05, "model": "<net>", "label_smoothing": smoothing}
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    (run_dir / "result.json").write_text(json.dumps(result))
    (run_dir / "config.json").write_text(json.dumps({"config": config, "torch": "2.15", "starts": []}))
    write_report(run_dir, test, IMAGES)
    return (run_dir / "index.html").read_text(), np.array(Image.open(run_dir / "report.png").convert("RGB"))


TEST = evaluation(["plane", "a <b>", r"$\dog$"])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return report(tmp_path_factory.mktemp("report") / "<x & y>", TEST, test_accuracy_tta=0.7, tta="crop")


def test_page_is_well_formed_self_contained_and_escaped(written):
    page = written[0]
    for element in ElementTree.fromstring(page).iter():
        for name, value in element.attrib.items():
            assert not name.endswith(("src", "href")) or value.startswith(("data:", "#"))
    assert not re.search(r"<script|@import|url\((?!#)", page)
    assert "&lt;x &amp; y&gt;" in page
    assert "<span>&lt;net&gt;</span>" in page
    assert page.count("a &lt;b&gt;") >= 5, "bars, two sides of the matrix, wrong pictures, list"
    assert not re.search("<x|<net|<b>(?!a &lt;b&gt;|plane|[$])", page)


def test_page_has_every_section(written):
    page = written[0]
    assert "<h1>Test accuracy 66.67 %: 200 of 300 test images</h1>" in page
    for fact in ("70.00 % with test-time augmentation (crop)", "40 steps of 500 images", "then 1 process on cpu, fp32"):
        assert fact in page
    sections = ["Most confidently wrong", "Accuracy of each class", "Configuration"]
    assert re.findall(r"<(?:h2|summary)>([^<:]+)", page) == sections
    texts = re.findall("<text[^>]*>([^<]+)</text>", page)
    charts = ("Cross-entropy", "Test accuracy, %", "Images per second", "Accuracy of each class, %")
    assert {*charts, "Confusion matrix, images"} <= {*texts}
    percents = [f"{100 * value:.1f}" for value in TEST.class_accuracies().values()]
    assert [text for text in texts if text in percents] == percents
    assert re.findall(r"<span>([\d.]+) %</span>", page) == percents
    assert [int(text) for text in texts if text.isdigit()][-9:] == TEST.confusion().flatten().tolist()
    assert "<span>lr</span><span>0.05</span>" in page
    assert "training, with label smoothing 0.2" in texts, "the curves do not compare"
    assert "Synthetic" not in page


def test_wrong_pictures_are_the_test_images(written):
    found = re.findall(r'base64,([^"]+)" alt="test image (\d+), class ([^"]+)" />', written[0])
    assert [int(i) for _, i, _ in found] == TEST.most_confidently_wrong(36)
    for content, i, name in found:
        pixels = np.array(Image.open(io.BytesIO(base64.b64decode(content))))
        assert np.array_equal(pixels, IMAGES[int(i)].permute(1, 2, 0).numpy())
        assert name.replace("&lt;", "<").replace("&gt;", ">") == TEST.classes[TEST.labels[int(i)]]


def test_synthetic_dataset_with_a_hundred_classes(written, tmp_path):
    page, picture = report(tmp_path / "run", evaluation([f"class {i}." for i in range(100)]), dataset="synthetic")
    assert "Synthetic dataset, not CIFAR-10" in page
    assert (picture == RED).all(2).any()
    assert not (written[1] == RED).all(2).any()
    assert all(f"<span>class {i}.</span><span>" in page for i in range(100)), "a class has no accuracy"
    assert page.count("<text") < 150, "ten thousand numbers in the confusion matrix"


@pytest.mark.filterwarnings("error")
def test_no_records_no_mistakes_and_an_empty_class(tmp_path):
    test = replace(TEST, predicted=TEST.labels, classes=("a", "b", "c" * 200, "empty"))
    page, _ = report(tmp_path / "run", test, [], smoothing=0.0)
    assert ">training<" in page
    assert "Most confidently wrong" not in page
    assert "<span>empty</span><span>no images</span>" in page


@pytest.mark.filterwarnings("error")
def test_classes_of_any_script_are_drawn_by_installed_fonts_or_numbered(tmp_path, monkeypatch):
    monkeypatch.setattr(plotting, "get_font_names", lambda: ["Comic Sans MS", "Malgun Gothic"])
    with plotting.default_style():
        assert plotting.matplotlib.rcParams["font.family"] == ["sans-serif", "Malgun Gothic"]
    monkeypatch.setattr(plotting, "get_font_names", lambda: ["Comic Sans MS"])
    page, _ = report(tmp_path / "run", replace(TEST, classes=("cat", "猫", "é")))
    texts = re.findall("<text[^>]*>([^<]+)</text>", page)
    assert [texts.count(name) for name in ("cat", "class 1", "é", "猫")] == [3, 3, 3, 0], (
        "bars, two sides of the matrix"
    )
    assert "<span>class 1: 猫</span>" in page
