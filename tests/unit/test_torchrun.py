"""One real launch: two ranks of torchrun train the tutorial to what one process does."""

import re

import pytest
import torch

import train_ddp
from cifar.checkpoint import checkpoint_path, load_checkpoint
from cifar.config import TrainConfig
from cifar.data import load_data
from cifar.evaluation import evaluate
from cifar.models import build_model
from tests.helpers.comparing import shrink_synthetic, write_no_report
from tests.helpers.processes import records, result, torchrun
from tests.helpers.small import TEST_SIZE, TRAIN_SIZE

STEPS = 12
FLAGS = ["--dataset", "synthetic", "--global-batch-size", "8", "--max-steps", str(STEPS), "--log-steps", "1"]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    shrink_synthetic(monkeypatch, TRAIN_SIZE, TEST_SIZE)
    write_no_report(monkeypatch)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Return the run directory and the standard output of two ranks."""
    folder = tmp_path_factory.mktemp("two")
    flags = [*FLAGS, "--local-batch-size", 2, "--run-dir", folder / "run"]
    output = torchrun(2, *flags, cwd=folder, script=("-m", "tests.helpers.small"))
    return folder / "run", output.stdout


def test_losses_equal_those_of_one_process(two, tmp_path):
    flags = [*FLAGS, "--local-batch-size", "8", "--run-dir", str(tmp_path / "one")]
    train_ddp.main([*flags, "--device", "cpu", "--wandb", "disabled"])
    expected = [(step, pytest.approx(loss, abs=1e-5)) for step, loss in records(tmp_path / "one", "train/loss")]
    assert records(two[0], "train/loss") == expected
    assert len(expected) == STEPS


def test_accuracy_is_exact(two, runtime):
    """Two ranks with 501 and 500 of 1,001 images find what one process finds in all of them."""
    got, net = result(two[0]), build_model("net", 10)
    net.load_state_dict(load_checkpoint(checkpoint_path(two[0], STEPS))["state"]["model"])
    with torch.no_grad():
        test = evaluate(net, load_data(TrainConfig(dataset="synthetic"), runtime).test, runtime)
    assert (got["world_size"], got["test_correct"], got["test_total"]) == (2, test.correct, TEST_SIZE)
    assert got["test_loss"] == pytest.approx(test.loss, abs=1e-6)


def test_only_rank_zero_prints(two):
    text = two[1]
    assert "2 local x 2 processes x 2 accumulated = 8 global" in text
    assert "2 processes on CPU (gloo)" in text
    for line in ("Finished Training", f"Accuracy of the network on the {TEST_SIZE} test images: "):
        assert text.count(line) == 1
    assert len(re.findall(r"^\[1, +\d+\] loss: \d\.\d{3}$", text, re.M)) == STEPS
