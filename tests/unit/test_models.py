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


def test_whitening_layer_whitens():
    net = build_model("speed", 10, lambda: IMAGES)
    outputs = net.whiten(IMAGES).detach()
    patches = outputs[:, :12].transpose(0, 1).flatten(1)
    assert torch.allclose(patches.mean(1), torch.zeros(12), atol=1e-3)
    assert torch.allclose(patches.cov(), torch.eye(12), atol=1e-2)
    assert torch.allclose(outputs[:, 12:], -outputs[:, :12], atol=1e-5)


def test_convolutions_start_as_the_identity():
    conv = build_model("speed", 10).groups[1].convs[0]  # 64 to 256 channels
    x = torch.rand(2, 64, 8, 8)
    assert torch.allclose(conv(x)[:, :64], x, atol=1e-5)
