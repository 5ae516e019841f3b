"""python -m cifar.explain: what it prints holds, and it would not be printed if it did not."""

import pytest
import torch

from cifar import explain
from cifar.errors import UserError

HERE = ["--dataset", "synthetic", "--device", "cpu"]


def test_it_shows_every_link(capsys):
    explain.main(HERE)
    said = capsys.readouterr().out
    assert "a micro-batch of synthetic, [4, 3, 32, 32] in [-1.00, 1.00]" in said
    for shapes in ("[4, 3, 32, 32] -> [4, 6, 28, 28]", "[4, 6, 28, 28] -> [4, 6, 14, 14]",
                   "[4, 16, 10, 10] -> [4, 16, 5, 5]", "[4, 400] -> [4, 120]", "[4, 84] -> [4, 10]"):  # fmt: skip
        assert shapes in said
    for words in ("every .grad is None before it", "loss: cross-entropy 2.", "conv1.weight.grad", "fc3.bias.grad",
                  "p - lr * buffer, lr 0.001", "norm"):  # fmt: skip
        assert words in said
    assert "ALL-REDUCE" not in said, "one process exchanges nothing"


def test_it_takes_the_recipes_own_update_rule(capsys):
    explain.main([*HERE, "--recipe", "wide", "--local-batch-size", "16"])
    assert "p - lr * (grad + weight decay * p + momentum * buffer)" in capsys.readouterr().out


def test_an_optimizer_that_does_something_else_is_caught(monkeypatch):
    """The formula is checked on the numbers: with another update, the command fails instead of telling tales."""
    step = torch.optim.SGD.step

    def half_a_step(self, closure=None):
        for group in self.param_groups:
            group["lr"] /= 2
        return step(self, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", half_a_step)
    with pytest.raises(RuntimeError, match=r"does not: the update is p - lr \* buffer"):
        explain.main([*HERE, "--lr", "1"])


def test_gradients_that_are_not_none_before_backward_are_caught(monkeypatch):
    build = explain.build_model

    def with_gradients(name):
        net = build(name)
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return net

    monkeypatch.setattr(explain, "build_model", with_gradients)
    with pytest.raises(RuntimeError, match=r"every \.grad is None before backward"):
        explain.main(HERE)


def test_fp16_is_refused_as_its_gradients_are_scaled():
    with pytest.raises(UserError, match="fp16"):
        explain.main([*HERE, "--precision", "fp16"])
