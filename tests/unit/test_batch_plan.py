"""The batch arithmetic: local batch x world size x accumulation = global batch."""

import dataclasses
from pathlib import Path

import pytest

from cifar.batch_plan import BatchPlan
from cifar.cli import parse_args
from cifar.config import TrainConfig
from cifar.console import describe
from cifar.errors import UserError
from cifar.optim import base_learning_rate


def plan_of(flags, world_size=1):
    config = parse_args(flags.split())
    return config, BatchPlan.make(config, world_size, 50_000)


@pytest.mark.parametrize(
    ("flags", "world_size", "expected"),
    [
        ("--local-batch-size 8", 3, (8, 24, 1, 2083)),
        ("--local-batch-size 8 --global-batch-size 96", 3, (8, 96, 4, 520)),
        # A recipe that states its global batch keeps it at any number of processes.
        ("--recipe speed94", 1, (2000, 2000, 1, 25)),
        ("--recipe speed94", 2, (1000, 2000, 1, 25)),
        ("--recipe speed94", 3, (666, 1998, 1, 25)),
        ("--recipe speed94 --local-batch-size 500", 2, (500, 2000, 2, 25)),
    ],
)
def test_arithmetic(flags, world_size, expected):
    _, plan = plan_of(flags, world_size)
    assert (plan.local_batch_size, plan.global_batch_size, plan.accumulation, plan.steps_per_epoch) == expected


@pytest.mark.parametrize(
    ("flags", "world_size", "words"),
    [
        ("--local-batch-size 4 --global-batch-size 10", 2, ["10", "4", "2", "8", "8 or 16"]),
        ("--local-batch-size 4 --global-batch-size 6", 2, ["6", "4", "2", "8", "--local-batch-size"]),
        ("--local-batch-size 50001", 1, ["50001", "50000"]),
    ],
)
def test_size_that_does_not_divide_names_the_numbers(flags, world_size, words):
    with pytest.raises(UserError) as mistake:
        plan_of(flags, world_size)
    assert all(word in str(mistake.value) for word in words)


@pytest.mark.parametrize(
    ("size", "world_size", "fits"), [(4, 3, "2 or 4"), (4, 5, "4"), (1, 2, "1"), (2000, 7, "5 or 8"), (6, 4, "3 or 6")]
)
def test_resumed_run_names_the_numbers_of_processes_that_fit(size, world_size, fits):
    config = TrainConfig(global_batch_size=size, resume=Path("run"))
    with pytest.raises(UserError, match=rf"^--resume run: .* {world_size} processes: continue it on {fits}$"):
        BatchPlan.make(config, world_size, 50_000)
    for number in map(int, fits.split(" or ")):
        assert BatchPlan.make(config, number, 50_000).global_batch_size == size


@pytest.mark.parametrize(
    ("flags", "world_size", "expected"),
    [
        ("--local-batch-size 512", 1, 256),
        ("--local-batch-size 512", 4, 256),
        ("--recipe speed94", 3, 333),
        ("--local-batch-size 7 --global-batch-size 42", 2, 3),
        ("--local-batch-size 11", 1, 1),
        ("--local-batch-size 1 --global-batch-size 8", 2, None),
    ],
)
def test_smaller_local_batch_keeps_the_global_batch(flags, world_size, expected):
    config, plan = plan_of(flags, world_size)
    assert plan.smaller_local_batch() == expected
    if expected is not None:
        more = dataclasses.replace(config, local_batch_size=expected, global_batch_size=plan.global_batch_size)
        assert BatchPlan.make(more, world_size, 50_000) == dataclasses.replace(plan, local_batch_size=expected)


def test_lr_scales_with_the_global_batch():
    assert base_learning_rate(*plan_of("", world_size=4)) == pytest.approx(0.004)
    assert base_learning_rate(*plan_of("--lr 0.01 --global-batch-size 8")) == pytest.approx(0.02)
    assert base_learning_rate(*plan_of("--lr-scaling none", world_size=4)) == 0.001
    assert base_learning_rate(*plan_of("--recipe wide")) == 0.05
    assert base_learning_rate(*plan_of("--recipe speed94", world_size=3)) == 1340
    assert base_learning_rate(*plan_of("--local-batch-size 64")) == pytest.approx(0.016)


def test_banner_shows_the_arithmetic():
    batches, rate = describe(*plan_of("--global-batch-size 16", world_size=2))
    assert "4 local x 2 processes x 2 accumulated = 16 global" in batches
    assert "0.001 x 16 / 4 = 0.004" in rate
    assert "not scaled" in describe(*plan_of("--lr-scaling none", world_size=2))[1]
