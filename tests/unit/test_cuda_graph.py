"""The captured step gives the numbers of the plain one."""

import sys

import pytest
import torch

import train_ddp
from cifar.errors import UserError
from tests.helpers.processes import records, run

FLAGS = ["--dataset", "synthetic", "--wandb", "disabled", "--local-batch-size", "32", "--global-batch-size", "64",
         "--log-steps", "1", "--max-steps", "40", "--checkpoint-steps", "20"]  # fmt: skip
RECIPES = [["--recipe", "tutorial", "--lr-scaling", "none"], ["--recipe", "speed94"], ["--precision", "bf16"]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("flags", RECIPES, ids=" ".join)
def test_a_captured_step_trains_as_the_plain_one(tmp_path, flags):
    curves = []
    for name, switch in (("plain", []), ("graph", ["--cuda-graph"])):
        command = [sys.executable, train_ddp.__file__, *FLAGS, *flags, *switch, "--run-dir", tmp_path / name]
        output = run(command, tmp_path)
        assert output.returncode == 0, output.stderr
        curves.append(dict(records(tmp_path / name, "train/loss")))
    assert curves[1] == pytest.approx(curves[0], abs=2e-3)


def test_without_a_gpu_it_is_a_mistake():
    with pytest.raises(UserError, match="--cuda-graph needs a GPU"):
        train_ddp.main([*FLAGS, "--cuda-graph", "--device", "cpu"])


def test_fp16_is_a_mistake():
    with pytest.raises(UserError, match="fp32 or bf16"):
        train_ddp.main([*FLAGS, "--cuda-graph", "--precision", "fp16"])
