"""One real launch: two ranks of torchrun train the tutorial to what one process does."""

import re

import pytest

import train_ddp
from tests.helpers.comparing import shrink_synthetic, write_no_report
from tests.helpers.processes import records, result, torchrun
from tests.helpers.small import TEST_SIZE, TRAIN_SIZE

STEPS = 12
FLAGS = ["--dataset", "synthetic", "--global-batch-size", "8", "--max-steps", str(STEPS), "--log-steps", "1"]


def test_two_ranks_train_as_one_process(tmp_path, monkeypatch):
    """They test 501 and 500 of 1,001 images; only rank zero prints."""
    one, two = tmp_path / "one", tmp_path / "two"
    flags = [*FLAGS, "--local-batch-size", 2, "--run-dir", two]
    text = torchrun(2, *flags, cwd=tmp_path, script=("-m", "tests.helpers.small")).stdout
    shrink_synthetic(monkeypatch, TRAIN_SIZE, TEST_SIZE)
    write_no_report(monkeypatch)
    flags = [*FLAGS, "--local-batch-size", "8", "--run-dir", str(one)]
    train_ddp.main([*flags, "--device", "cpu", "--wandb", "disabled"])
    losses, expected = records(two, "train/loss"), records(one, "train/loss")
    assert losses == [(step, pytest.approx(loss, abs=1e-5)) for step, loss in expected]
    assert len(losses) == STEPS
    assert (result(two)["world_size"], result(two)["test_total"]) == (2, TEST_SIZE)
    assert result(two)["test_loss"] == pytest.approx(result(one)["test_loss"], abs=1e-5)
    assert "2 local x 2 processes x 2 accumulated = 8 global" in text
    assert "2 processes on CPU (gloo)" in text
    for line in ("Finished Training", f"Accuracy of the network on the {TEST_SIZE} test images: "):
        assert text.count(line) == 1
    assert len(re.findall(r"^\[1, +\d+\] loss: \d\.\d{3}$", text, re.M)) == STEPS
