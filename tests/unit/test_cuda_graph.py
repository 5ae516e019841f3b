"""A captured training step gives the numbers of the eager one."""

import pytest
import torch

import train_ddp
from cifar.errors import UserError
from tests.helpers.processes import records, train

FLAGS = ["--dataset", "synthetic", "--wandb", "disabled", "--local-batch-size", "32", "--global-batch-size", "64",
         "--log-steps", "1", "--max-steps", "40", "--checkpoint-steps", "20"]  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("flags", ["--recipe tutorial --lr-scaling none", "--recipe speed94", "--precision bf16"])
def test_captured_step_trains_as_the_eager_one(tmp_path, flags):
    curves = []
    for name, switch in (("eager", []), ("graph", ["--cuda-graph"])):
        command = [*FLAGS, *flags.split(), *switch, "--device", "cuda", "--run-dir", tmp_path / name]
        output = train(*command, cwd=tmp_path)
        assert output.returncode == 0, output.stderr
        curves.append(dict(records(tmp_path / name, "train/loss")))
    assert curves[1] == pytest.approx(curves[0], abs=2e-3)


@pytest.mark.parametrize(
    ("flags", "message"), [("--device cpu", "--cuda-graph needs a GPU"), ("--precision fp16", "fp32 or bf16")]
)
def test_refusals(flags, message):
    with pytest.raises(UserError, match=message):
        train_ddp.main([*FLAGS, "--cuda-graph", *flags.split()])
