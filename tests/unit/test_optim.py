"""The optimizers: Muon against its definition, and which parameters go where."""

import pytest
import torch
from torch import nn

from cifar.config import TrainConfig
from cifar.models import build_model
from cifar.optim import Muon, build_optimizer, orthogonalize, set_learning_rate


@pytest.mark.parametrize("shape", [(16, 50), (50, 16), (24, 24)])
def test_orthogonalize_moves_the_singular_values_towards_one(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    before, after = (torch.linalg.svd(x, full_matrices=False) for x in (matrix, orthogonalize(matrix, steps=5)))
    assert after.S.min() > 0.3
    assert after.S.max() < 1.5
    assert before.S.max() / before.S.median() > 1.2, "the matrix was orthogonal to begin with"
    # The directions stay: U^T X V is diagonal in the matrix's own singular vectors.
    rotated = before.U.T @ orthogonalize(matrix) @ before.Vh.T
    assert (rotated - torch.diag(rotated.diagonal())).abs().max() < 1e-3


def test_orthogonalize_does_not_depend_on_the_scale():
    matrix = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(orthogonalize(matrix), orthogonalize(1000 * matrix), atol=1e-4)


def test_muons_other_groups_are_torchs_sgd():
    def trained(kind, nesterov):
        torch.manual_seed(0)
        net = nn.Linear(5, 3)
        optimizer = kind(net.parameters(), lr=0.01, momentum=0.8, nesterov=nesterov, weight_decay=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            net(torch.ones(2, 5)).pow(2).sum().backward()
            optimizer.step()
        return net.weight.detach()

    for nesterov in (True, False):
        assert torch.allclose(trained(Muon, nesterov), trained(torch.optim.SGD, nesterov), atol=1e-6)


def test_muon_keeps_filters_at_their_norm_and_steps_by_lr():
    filters = nn.Parameter(torch.randn(8, 3, 3, 3))
    optimizer = Muon([{"params": [filters], "orthogonal": True}], lr=0.1, momentum=0.6, nesterov=True)
    filters.grad = torch.randn(8, 3, 3, 3)
    normed = filters.detach() * 8**0.5 / filters.detach().norm()
    optimizer.step()
    update = (normed - filters.detach()).flatten(1) / 0.1
    assert torch.linalg.svdvals(update).max() < 1.5
    assert torch.allclose(update, orthogonalize(filters.grad.flatten(1)), atol=1e-4)


def test_every_trained_parameter_is_in_one_group():
    net = build_model("speed")
    config = TrainConfig.from_recipe("speed94")
    groups = build_optimizer(net, config).param_groups
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in net.parameters() if parameter.requires_grad)
    head, biases, filters = groups
    assert [tuple(parameter.shape) for parameter in head["params"]] == [(10, 256)]
    assert {parameter.ndim for parameter in biases["params"]} == {1}
    assert {parameter.ndim for parameter in filters["params"]} == {4}
    assert filters["orthogonal"]
    assert not head["orthogonal"]


def test_the_schedule_moves_all_groups_alike():
    config = TrainConfig.from_recipe("speed94")
    optimizer = build_optimizer(build_model("speed"), config)
    set_learning_rate(optimizer, config.lr / 2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([670, 53.6, 0.12])


def test_one_group_of_fused_sgd_where_nothing_else_is_asked_for():
    net = build_model("net")
    optimizer = build_optimizer(net, TrainConfig())
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert group["fused"]
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in net.parameters()]


def test_an_update_that_the_scaler_skips_leaves_no_trace():
    """fp16's first updates overflow as a rule; torch's fused SGD then left momentum in whatever memory it got."""

    def trained(skip):
        torch.manual_seed(0)
        net = nn.Linear(50, 20)
        optimizer = build_optimizer(net, TrainConfig(lr=0.1, momentum=0.9))
        optimizer.grad_scale = torch.tensor(1.0)
        for found in [1.0] * skip + [0.0] * 3:
            [torch.full((50, 20), float("nan")) for _ in range(20)].clear()  # freed: the next to be allotted
            for parameter in net.parameters():
                parameter.grad = torch.full_like(parameter, float("inf") if found else 0.5)
            optimizer.found_inf = torch.tensor(found)
            optimizer.step()
        return net.weight.detach()

    assert torch.equal(trained(skip=2), trained(skip=0))


def test_momentum_from_zeros_is_torchs_own_first_update():
    def trained(optimizer, net):
        for _ in range(3):
            for parameter in net.parameters():
                parameter.grad = torch.sin(parameter.detach() * 100)
            optimizer.step()
        return net.weight.detach()

    nets = [nn.Linear(50, 20) for _ in "12"]
    nets[1].load_state_dict(nets[0].state_dict())
    ours = build_optimizer(nets[0], TrainConfig(lr=0.1, momentum=0.9))
    assert torch.equal(
        trained(ours, nets[0]), trained(torch.optim.SGD(nets[1].parameters(), 0.1, 0.9, fused=True), nets[1])
    )
