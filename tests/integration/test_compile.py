"""A compiled model trains as the plain one."""

import pytest
import torch

from cifar.config import TrainConfig
from cifar.models import build_model
from cifar.optim import build_optimizer
from train_ddp import train_step

pytestmark = pytest.mark.slow


def trained(runtime, synthetic, compile):
    torch.manual_seed(0)
    net = build_model("net", 10)
    names = net.state_dict().keys()
    model = runtime.prepare(net, compile)
    assert net.state_dict().keys() == names, "checkpoints of both fit both"
    optimizer = build_optimizer(net, TrainConfig(lr=0.05))
    for rows in torch.arange(40).split(8):
        train_step(model, [synthetic.train.dataset[rows]], 8, optimizer, runtime)
    return torch.cat([parameter.flatten() for parameter in net.parameters()]).detach()


def test_compiled_model_trains_the_same(runtime, synthetic):
    try:
        compiled = trained(runtime, synthetic, compile=True)
    except Exception as error:
        if "compiler" not in str(error).lower():
            raise
        pytest.skip("torch.compile finds no C++ compiler here")
    assert torch.allclose(trained(runtime, synthetic, compile=False), compiled, atol=1e-5)
