"""Console output: on a terminal a bar with images/s and the remaining time, plain lines elsewhere; the banner."""

import re

import pytest
import torch

import train_ddp
from cifar.batch_plan import BatchPlan
from cifar.datasets import DATASETS
from cifar.evaluation import Evaluation, evaluate
from cifar.models import build_model
from cifar.recipes import config_from_recipe
from cifar.records.console import SYNTHETIC_WARNING, Console, print_test
from tests.helpers.comparing import make_runs_tiny, tiny_dataset
from tests.helpers.terminal import shown

FLAGS = "--dataset synthetic --device cpu --wandb disabled"


def test_terminal_shows_a_bar_between_whole_lines(tmp_path, monkeypatch):
    make_runs_tiny(monkeypatch, 2_000)
    flags = [*FLAGS.split(), "--max-steps", "450", "--log-steps", "150", "--run-dir", str(tmp_path / "run")]
    written = shown(lambda: train_ddp.main(flags))
    lines = [line.strip() for line in re.split(r"[\r\n]+", written)]
    assert any(re.search(r"\d+%\|.*\[\d+:\d\d<\d+:\d\d, .*images/s\]", line) for line in lines)
    for step in (150, 300, 450):
        assert any(re.fullmatch(rf"\[1, {step:5d}\] loss: \d\.\d{{3}}", line) for line in lines), lines


def test_accuracies_in_the_tutorials_words(synthetic, runtime, capsys):
    torch.manual_seed(0)
    test = evaluate(build_model("net", 10), synthetic.test, runtime)
    print_test(runtime.print0, "cifar10", test)
    text = capsys.readouterr().out
    assert f"Accuracy of the network on the 1000 test images: {100 * test.correct // test.total} %\n" in text
    for name, accuracy in zip(("plane", "car  ", "bird "), test.class_accuracies().values(), strict=False):
        assert f"Accuracy for class: {name} is {100 * accuracy:.1f} %\n" in text
    assert "WARNING" not in text
    assert "..." not in text


def test_of_a_hundred_classes_the_lowest_and_the_highest(runtime, capsys):
    """Class i has 100 test images, of which i are right; the last class has none."""
    labels = torch.arange(100).repeat_interleave(100)
    predicted = torch.where(torch.arange(100).repeat(100) < labels, labels, 100)
    names = tuple(f"class {i}" for i in range(101))
    zeros = torch.zeros(len(labels), dtype=torch.float64)
    print_test(runtime.print0, "cifar100", Evaluation(zeros, labels, predicted, zeros, names))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "The 10 lowest and the 10 highest accuracies of 101 classes:"
    rows = [f"Accuracy for class: {f'class {i}':8s} is {i:.1f} %" for i in range(100)]
    assert lines[3:] == [*rows[:10], "...", *rows[90:]]


@pytest.mark.parametrize(("gpus", "model", "says"), [(4, "net", True), (1, "net", False), (4, "resnet18", False)])
def test_banner_says_that_tiny_batches_are_not_for_several_gpus(monkeypatch, gpus, model, says):
    monkeypatch.setattr("cifar.records.console.describe_processes", lambda *_: "")
    lines = []
    config = config_from_recipe("resnet18" if model == "resnet18" else "tutorial")
    plan = BatchPlan.make(config, gpus, 50_000)
    parameters = sum(parameter.numel() for parameter in build_model(model, 10).parameters())
    Console(config, plan, lines.append, True).banner(torch.device("cuda"), 1, "cifar10", parameters, "run", "", {})
    assert any("a step waits for the host" in line for line in lines) == says


@pytest.mark.parametrize(("size", "warns"), [(28, False), (32, True)])
def test_rate_far_above_the_recipes_is_a_warning(tmp_path, monkeypatch, capsys, size, warns):
    make_runs_tiny(monkeypatch)
    flags = [*FLAGS.split(), "--global-batch-size", str(size), "--max-steps", "1", "--run-dir", str(tmp_path / "run")]
    train_ddp.main(flags)
    assert ("WARNING: lr is 8 times the recipe's" in capsys.readouterr().out) == warns


@pytest.mark.parametrize(("name", "warnings"), [("synthetic", 2), ("mine", 0)])
def test_only_synthetic_is_announced_as_such(name, warnings, tmp_path, monkeypatch, capsys):
    """At the start and beside the accuracy; a new dataset is named with its classes."""
    make_runs_tiny(monkeypatch)
    monkeypatch.setitem(DATASETS, "mine", lambda _: tiny_dataset(classes=("red", "green", "blue")))
    flags = [*FLAGS.split(), "--dataset", name, "--max-steps", "3", "--run-dir", str(tmp_path / "run")]
    train_ddp.main(flags)
    text = capsys.readouterr().out
    classes = 10 if name == "synthetic" else 3
    assert re.search(rf"^dataset +{name}\b.*200 training, 200 test, {classes} classes$", text, re.M)
    assert text.count(SYNTHETIC_WARNING) == warnings
    assert ("synthetic dataset" in text) == (name == "synthetic")
