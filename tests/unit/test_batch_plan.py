"""The batch arithmetic: the division of a global batch among processes and into micro-batches."""

import pytest

from cifar.batch_plan import BatchPlan
from cifar.cli import parse_args
from cifar.errors import UserError
from cifar.records.console import describe_batches, describe_rate


def plan_of(flags, world_size=1):
    config = parse_args(flags.split())
    return config, BatchPlan.make(config, world_size, 50_000)


@pytest.mark.parametrize(
    ("flags", "world_size", "whole", "steps", "expected"),
    [
        ("--local-batch-size 8", 3, 24, 2083, [[8]] * 3),
        ("--local-batch-size 8 --global-batch-size 96", 3, 96, 520, [[8] * 4] * 3),
        # A recipe that states its global batch keeps it at any number of processes.
        ("--recipe speed94", 1, 2000, 25, [[2000]]),
        ("--recipe speed94", 3, 2000, 25, [[667], [667], [666]]),
        ("--recipe speed94 --local-batch-size 500", 3, 2000, 25, [[334, 333], [334, 333], [333, 333]]),
        ("--recipe net-fast", 64, 64, 781, [[1]] * 64),
        ("--local-batch-size 64 --global-batch-size 65", 1, 65, 769, [[33, 32]]),
        ("--local-batch-size 1 --global-batch-size 3", 2, 3, 16_666, [[1, 1], [1]]),
        ("--local-batch-size 4 --global-batch-size 3", 3, 3, 16_666, [[1], [1], [1]]),
    ],
)
def test_shares_and_micro_batches_differ_by_one_image_at_most(flags, world_size, whole, steps, expected):
    _, plan = plan_of(flags, world_size)
    assert (plan.global_batch_size, plan.steps_per_epoch, plan.accumulation) == (whole, steps, len(expected[0]))
    assert [plan.micro_batch_sizes(rank) for rank in range(world_size)] == expected


@pytest.mark.parametrize(
    ("flags", "world_size", "words"),
    [
        ("--recipe net-fast", 65, ["64 images", "65 processes", "at most 64"]),
        ("--global-batch-size 1", 2, ["1 image ", "2 processes", "at most 1"]),
        ("--local-batch-size 50001", 1, ["50001", "50000"]),
    ],
)
def test_size_that_cannot_be_divided_names_the_numbers(flags, world_size, words):
    with pytest.raises(UserError) as mistake:
        plan_of(flags, world_size)
    assert all(word in str(mistake.value) for word in words)


def test_lr_scales_with_the_global_batch():
    def base_rate(flags, world_size=1):
        config, plan = plan_of(flags, world_size)
        return plan.base_learning_rate(config)

    assert base_rate("", world_size=4) == pytest.approx(0.004)
    assert base_rate("--lr 0.01 --global-batch-size 8") == pytest.approx(0.02)
    assert base_rate("--lr-scaling none", world_size=4) == 0.001
    assert base_rate("--recipe wide") == 0.05
    assert base_rate("--recipe speed94", world_size=3) == 1340
    assert base_rate("--local-batch-size 64") == pytest.approx(0.016)


def test_banner_shows_the_arithmetic():
    even = plan_of("--global-batch-size 16", world_size=2)
    assert "4 local x 2 processes x 2 accumulated = 16 global" in describe_batches(*even)
    assert "0.001 x 16 / 4 = 0.004" in describe_rate(*even)
    uneven = plan_of("--global-batch-size 16", world_size=3)
    assert "16 global among 3 processes: 5 or 6 each, in 2 micro-batches of at most 3;" in describe_batches(*uneven)
    assert "64 global among 3 processes: 21 or 22 each;" in describe_batches(*plan_of("--recipe net-fast", 3))
    assert "not scaled" in describe_rate(*plan_of("--lr-scaling none", world_size=2))
