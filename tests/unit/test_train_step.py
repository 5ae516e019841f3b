"""From the loss to the optimizer: that section of cifar/README.md, by its numbers, on the program's train_step."""

import copy

import pytest
import torch
import torch.nn.functional as F

import train_ddp
from cifar.config import TrainConfig
from cifar.models import build_model
from cifar.optim import build_optimizer
from tests.benchmarks.baselines import make_net
from tests.helpers.comparing import shrink_synthetic, write_no_report
from tests.helpers.processes import records
from train_ddp import train_step


@pytest.fixture
def net():
    torch.manual_seed(0)
    return build_model("net", 10)


def flat(net):
    """Return a copy of all weights, float32 [n]."""
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


@pytest.fixture
def images(synthetic):
    return synthetic.train.dataset


def test_sgd_update(net, images, runtime):
    """1 and 3: the optimizer holds the parameters, and reads their .grad."""
    optimizer = build_optimizer(net, TrainConfig(lr=0.1))
    buffers = {name: torch.zeros_like(parameter) for name, parameter in net.named_parameters()}
    for _ in range(3):
        before = copy.deepcopy(net.state_dict())
        loss = train_step(net, [images[torch.arange(8)]], 8, optimizer, runtime)
        for name, parameter in net.named_parameters():
            buffers[name] = 0.9 * buffers[name] + parameter.grad
            assert torch.allclose(optimizer.state[parameter]["momentum_buffer"], buffers[name], atol=1e-7)
            assert torch.allclose(parameter, before[name] - 0.1 * buffers[name], atol=1e-7)
    assert loss.item() < 2.3


@pytest.mark.parametrize("sizes", [8, [11, 11, 10], [20, 12]])
def test_micro_batches_of_any_sizes_equal_one_batch(net, images, runtime, sizes):
    """4."""

    def trained(sizes):
        own = copy.deepcopy(net)
        optimizer = build_optimizer(own, TrainConfig(lr=0.1))
        steps = [[images[rows] for rows in step.split(sizes)] for step in torch.arange(96).split(32)]
        losses = [train_step(own, batches, 32, optimizer, runtime, label_smoothing=0.1) for batches in steps]
        return torch.stack(losses), flat(own)

    (losses, weights), (losses_of_parts, weights_of_parts) = trained(32), trained(sizes)
    assert torch.allclose(losses, losses_of_parts, atol=1e-5)
    assert torch.allclose(weights, weights_of_parts, atol=1e-6)
    assert not torch.allclose(weights, flat(net), atol=1e-3), "nothing was trained"


def test_program_equals_the_tutorials_loop(tmp_path, synthetic, monkeypatch):
    """With the Net of the baselines, so that they train the same."""
    shrink_synthetic(monkeypatch, 2_000, 100)
    write_no_report(monkeypatch)
    flags = ["--dataset", "synthetic", "--device", "cpu", "--wandb", "disabled", "--run-dir", str(tmp_path / "run")]
    train_ddp.main([*flags, "--max-steps", "60", "--log-steps", "20"])
    torch.manual_seed(0)
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    synthetic.train.set_epoch(0)
    order = torch.cat(list(synthetic.train.sampler)).split(4)
    train, running, losses = synthetic.train.dataset, 0.0, []
    for i, rows in enumerate(order[:60]):
        optimizer.zero_grad()
        loss = F.cross_entropy(net((train.images[rows] / 255 - 0.5) / 0.5), train.labels[rows])
        loss.backward()
        optimizer.step()
        running += loss.item()
        if i % 20 == 19:
            losses.append((i + 1, pytest.approx(running / 20, abs=1e-5)))
            running = 0.0
    assert records(tmp_path / "run", "train/loss") == losses
