"""The models: shapes, sizes, initialization."""

import pytest
import torch

from cifar.models import MODELS, build_model

IMAGES = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("name", MODELS)
def test_every_model_learns_from_a_batch(name):
    torch.manual_seed(0)
    model = build_model(name, 7, lambda: IMAGES)
    logits = model(IMAGES[:4])
    assert logits.shape == (4, 7)
    logits.logsumexp(1).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name


def test_net_is_the_tutorials():
    shapes = {name: tuple(parameter.shape) for name, parameter in build_model("net", 10).named_parameters()}
    assert shapes == {
        "conv1.weight": (6, 3, 5, 5), "conv1.bias": (6,), "conv2.weight": (16, 6, 5, 5), "conv2.bias": (16,),
        "fc1.weight": (120, 400), "fc1.bias": (120,), "fc2.weight": (84, 120), "fc2.bias": (84,),
        "fc3.weight": (10, 84), "fc3.bias": (10,),
    }  # fmt: skip


@pytest.mark.parametrize(("name", "parameters"), [("resnet18", 11_173_962), ("speed", 1_971_352 + 288 + 1152)])
def test_sizes(name, parameters):
    assert sum(parameter.numel() for parameter in build_model(name, 10).parameters()) == parameters
