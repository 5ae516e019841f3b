"""python -m cifar.explain prints claims only after checking them."""

import pytest
import torch

from cifar import explain
from cifar.errors import UserError

FLAGS = ["--dataset", "synthetic", "--device", "cpu"]

pytestmark = pytest.mark.usefixtures("tiny_runs")


def test_shows_every_link(capsys):
    explain.main(FLAGS)
    text = capsys.readouterr().out
    for words in ("FORWARD: a micro-batch of synthetic", "images [4, 3, 32, 32] in [-1.00, 1.00]",
                  "[4, 400] -> [4, 120]", "every .grad is None before it", "loss: cross-entropy 2.",
                  "conv1.weight.grad", "p - lr * buffer, lr 0.0", "ZERO_GRAD"):  # fmt: skip
        assert words in text
    assert "ALL-REDUCE" not in text, "one process exchanges nothing"


@pytest.mark.parametrize("flags", ["--recipe wide", "--nesterov", "--precision bf16"])
def test_other_recipes_are_refused(flags):
    with pytest.raises(UserError, match="only the tutorial's recipe is explained"):
        explain.main([*FLAGS, *flags.split()])


def test_wrong_update_is_found(monkeypatch):
    step = torch.optim.SGD.step

    def half_a_step(self, closure=None):
        for group in self.param_groups:
            group["lr"] /= 2
        return step(self, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", half_a_step)
    with pytest.raises(RuntimeError, match=r"does not: the update is p - lr \* buffer"):
        explain.main(FLAGS)
