"""Console output: on a terminal a bar with images/s and the remaining time, plain lines elsewhere; the banner."""

import io
import re
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch

import train_ddp
from cifar.datasets import DATASETS
from cifar.evaluation import Evaluation
from cifar.records.console import SYNTHETIC_WARNING, print_test
from tests.helpers.comparing import make_runs_tiny, tiny_dataset

FLAGS = "--device cpu --wandb disabled"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_terminal_shows_a_bar_between_whole_lines(tmp_path, monkeypatch):
    make_runs_tiny(monkeypatch, 2_000)
    terminal = Terminal()
    flags = f"{FLAGS} --dataset synthetic --max-steps 450 --log-steps 150 --run-dir {tmp_path / 'run'}"
    with redirect_stdout(terminal), redirect_stderr(terminal):
        train_ddp.main(flags.split())
    lines = [line.strip() for line in re.split(r"[\r\n]+", terminal.getvalue())]
    assert any(re.search(r"\d+%\|.*\[\d+:\d\d<\d+:\d\d, .*images/s\]", line) for line in lines)
    for step in (150, 300, 450):
        assert any(re.fullmatch(rf"\[1, {step:5d}\] loss: \d\.\d{{3}}", line) for line in lines), lines


def printed(count):
    """Return the lines about a test in which i of the 100 images of class i are right; the last class has none."""
    labels = torch.arange(count - 1).repeat_interleave(100)
    predicted = torch.where(torch.arange(100).repeat(count - 1) < labels, labels, count - 1)
    zeros = torch.zeros(len(labels), dtype=torch.float64)
    lines = []
    names = tuple(f"class {i}" for i in range(count))
    print_test(lines.append, "cifar", Evaluation(zeros, labels, predicted, zeros, names))
    return lines


def test_accuracies_in_the_tutorials_words():
    lines = printed(9)
    assert lines[0] == "Accuracy of the network on the 800 test images: 3 %", "3.5 %, rounded down"
    accuracies = [*(f"{i}.0" for i in range(8)), "nan"]
    assert lines[2:] == [f"Accuracy for class: class {i} is {accuracy} %" for i, accuracy in enumerate(accuracies)]


def test_of_a_hundred_classes_the_lowest_and_the_highest():
    lines = printed(101)
    assert lines[2] == "The 10 lowest and the 10 highest accuracies of 101 classes:"
    rows = [f"Accuracy for class: {f'class {i}':8s} is {i:.1f} %" for i in range(100)]
    assert lines[3:] == [*rows[:10], *rows[90:]]


@pytest.mark.parametrize(("name", "size"), [("synthetic", 32), ("mine", 28)])
def test_warnings_of_the_synthetic_dataset_and_of_a_high_rate(name, size, tmp_path, monkeypatch, capsys):
    """The dataset's at the start and beside the accuracy; a new dataset is named with its classes."""
    make_runs_tiny(monkeypatch)
    monkeypatch.setitem(DATASETS, "mine", lambda _: tiny_dataset(classes=("red", "green", "blue")))
    flags = f"{FLAGS} --dataset {name} --global-batch-size {size} --max-steps 1 --run-dir {tmp_path / 'run'}"
    train_ddp.main(flags.split())
    text = capsys.readouterr().out
    classes = 10 if name == "synthetic" else 3
    assert re.search(rf"^dataset +{name}\b.*200 training, 200 test, {classes} classes$", text, re.M)
    assert text.count(SYNTHETIC_WARNING) == (2 if name == "synthetic" else 0)
    assert ("synthetic dataset" in text) == (name == "synthetic")
    assert ("WARNING: lr is 8 times the recipe's" in text) == (size == 32)
