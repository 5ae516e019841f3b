"""What a person sees: on a terminal a bar with images/s and the time left, plain lines elsewhere."""

import re
import sys

import pytest

from cifar.console import print_test
from cifar.evaluation import evaluate
from tests.helpers.processes import ROOT
from tests.helpers.terminal import Terminal


@pytest.fixture(scope="module")
def on_a_terminal(tmp_path_factory):
    """All that a short training writes to a terminal of 120 columns."""
    flags = "--dataset synthetic --device cpu --wandb disabled --max-steps 600 --log-steps 200"
    command = [sys.executable, ROOT / "train_ddp.py", *flags.split()]
    with Terminal(command, tmp_path_factory.mktemp("terminal")) as terminal:
        assert terminal.end() == 0, terminal.written
        return terminal.written


def test_a_terminal_shows_images_per_second_and_the_time_left(on_a_terminal):
    bars = [line for line in re.split(r"[\r\n]+", on_a_terminal) if "images/s" in line]
    assert bars
    assert any(re.search(r"\d+%\|.*\[\d+:\d\d<\d+:\d\d, .*images/s\]", line) for line in bars)


def test_the_bar_does_not_tear_the_lines(on_a_terminal):
    lines = [line.strip() for line in re.split(r"[\r\n]+", on_a_terminal)]
    for step in (200, 400, 600):
        assert any(re.fullmatch(rf"\[1, {step:5d}\] loss: \d\.\d{{3}}", line) for line in lines), lines


def test_the_tutorials_words(synthetic, runtime, capsys):
    import torch

    from cifar.data import EvalLoader
    from cifar.models import build_model

    torch.manual_seed(0)
    test = evaluate(build_model("net"), EvalLoader(synthetic.test, 0, 1), runtime)
    print_test(runtime, synthetic, test)
    said = capsys.readouterr().out
    assert f"Accuracy of the network on the 10000 test images: {100 * test.correct // test.total} %\n" in said
    for name, accuracy in zip(("plane", "car  ", "bird "), test.class_accuracies(), strict=False):
        assert f"Accuracy for class: {name} is {100 * accuracy:.1f} %\n" in said
