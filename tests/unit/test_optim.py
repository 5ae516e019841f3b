"""The optimizers against their definitions, the learning-rate schedule, and the optimizer's state."""

import pytest
import torch
from torch import nn

from cifar.batch_plan import BatchPlan
from cifar.cli import parse_args
from cifar.models import build_model
from cifar.optim import Muon, build_optimizer, learning_rate, orthogonalize, orthogonalize_filters, set_learning_rate
from cifar.recipes import config_from_recipe

WARMUP = "--lr 1 --warmup-epochs 0.5 --local-batch-size 500 --lr-scaling none"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", {0: 0.001, 1: 0.001, 49_999: 0.001}),
        ("--recipe wide --epochs 2 --warmup-epochs 0", {0: 0.05, 390: 0.025, 780: 0.0}),
        ("--recipe speed94 --epochs 2", {0: 1340, 25: 670, 50: 0}),
        (WARMUP, {0: 0.02, 24: 0.5, 49: 1.0, 50: 1.0, 99: 1.0}),
        (f"{WARMUP} --schedule linear --epochs 1", {0: 0.02, 49: 0.51}),  # the two multiply
    ],
)
def test_schedules(flags, expected):
    config = parse_args(flags.split())
    plan = BatchPlan.make(config, 1, 50_000)
    assert {step: learning_rate(config, plan, step) for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(16, 50), (50, 16), (24, 24)])
def test_orthogonalize(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    before, after = (torch.linalg.svd(x, full_matrices=False) for x in (matrix, orthogonalize(matrix, steps=5)))
    assert before.S.max() / before.S.median() > 1.2, "the matrix was orthogonal to begin with"
    assert 0.3 < after.S.min() <= after.S.max() < 1.5
    rotated = before.U.T @ orthogonalize(matrix) @ before.Vh.T  # diagonal: the singular vectors stay
    assert (rotated - torch.diag(rotated.diagonal())).abs().max() < 1e-3
    assert torch.allclose(orthogonalize(matrix), orthogonalize(1000 * matrix), atol=1e-4)


def test_orthogonalize_filters():
    """All filters in one bfloat16 batch, as on a GPU, against each alone in float32: wide, tall, of one channel."""
    torch.manual_seed(0)
    filters = [torch.randn(shape) for shape in [(16, 3, 5, 5), (64, 8, 1, 1), (32, 16, 3, 3), (8, 1, 3, 3)]]
    filters = [filter.to(memory_format=torch.channels_last) for filter in filters]
    for filter, batched in zip(filters, orthogonalize_filters(filters), strict=True):
        alone = orthogonalize(filter.flatten(1)).view_as(filter)
        assert (batched.dtype, batched.shape) == (torch.float32, filter.shape)
        assert (batched - alone).norm() < 0.05 * alone.norm()
        if filter.shape[1] > 1:
            assert batched.stride() == filter.stride()


@pytest.mark.parametrize("nesterov", [True, False])
def test_other_groups_of_muon_are_sgd(nesterov):
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    flags = {"lr": 0.01, "momentum": 0.8, "nesterov": nesterov, "weight_decay": 0.1}
    muon, sgd = Muon(ours.parameters(), **flags), torch.optim.SGD(theirs.parameters(), **flags)
    for optimizer, net in ((muon, ours), (sgd, theirs)):
        for _ in range(4):
            for parameter in net.parameters():
                parameter.grad = torch.sin(parameter.detach() * 100)
            optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-6)


@pytest.mark.parametrize("start", [torch.randn, torch.zeros])
def test_muon_fixes_the_norm_and_orthogonalizes_the_update(start):
    filters = nn.Parameter(start(8, 3, 3, 3))
    optimizer = Muon([{"params": [filters], "orthogonal": True}], lr=0.1, momentum=0.6, nesterov=True)
    filters.grad = torch.randn(8, 3, 3, 3)
    normed = (filters.detach() * 8**0.5 / filters.detach().norm()).nan_to_num(0)
    optimizer.step()
    update = (normed - filters.detach()).flatten(1) / 0.1
    assert torch.allclose(update, orthogonalize(filters.grad.flatten(1)), atol=1e-4)


def test_groups_of_a_speed_recipe():
    net, config = build_model("speed", 10), config_from_recipe("speed94")
    optimizer = build_optimizer(net, config)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in net.parameters() if parameter.requires_grad)
    head, biases, filters = optimizer.param_groups
    assert [tuple(parameter.shape) for parameter in head["params"]] == [(10, 256)]
    assert {parameter.ndim for parameter in biases["params"]} == {1}
    assert {parameter.ndim for parameter in filters["params"]} == {4}
    assert [group["orthogonal"] for group in optimizer.param_groups] == [False, False, True]
    set_learning_rate(optimizer, config.lr / 2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([670, 53.6, 0.12])


@pytest.mark.parametrize("recipe", ["tutorial", "net-fast"])
def test_skipped_update_leaves_no_trace(recipe):
    """fp16's first updates usually overflow; torch's fused SGD then leaves its new momentum uninitialized."""

    def weights(scale, skip):
        torch.manual_seed(0)
        net = build_model("net", 10)
        optimizer = build_optimizer(net, config_from_recipe(recipe, lr=0.1))
        for found in [1.0] * skip + [0.0] * 3:
            [torch.full((50, 20), float("nan")) for _ in range(20)].clear()  # the memory that is allocated next
            for parameter in net.parameters():
                gradient = scale * torch.sin(torch.arange(parameter.numel())).view_as(parameter)
                parameter.grad = torch.full_like(parameter, float("inf")) if found else gradient
            if scale != 1 or skip:  # what GradScaler does
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(float(scale)), torch.tensor(found)
            optimizer.step()
        return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])

    assert torch.equal(weights(scale=1, skip=2), weights(scale=1, skip=0))
    assert torch.equal(weights(scale=1024, skip=2), weights(scale=1, skip=0))
    assert weights(scale=1, skip=0).isfinite().all()
