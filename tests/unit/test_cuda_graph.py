"""What a captured step refuses; that it trains as the eager one is checked on GPUs (tests/gpu/checks.py)."""

import pytest

import train_ddp
from cifar.errors import UserError


@pytest.mark.parametrize(
    ("flags", "message"), [("--device cpu", "--cuda-graph needs a GPU"), ("--precision fp16", "fp32 or bf16")]
)
def test_refusals(flags, message):
    with pytest.raises(UserError, match=message):
        train_ddp.main(["--dataset", "synthetic", "--wandb", "disabled", "--cuda-graph", *flags.split()])
