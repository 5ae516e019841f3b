"""The arithmetic of batches and learning rates."""

import pytest

from cifar.batch_plan import BatchPlan, base_learning_rate, describe, learning_rate
from cifar.config import parse_args
from cifar.errors import UserError


def plan_of(argv, world_size=1):
    config = parse_args(argv.split())
    return config, BatchPlan.make(config, world_size, 50_000)


def test_left_out_the_global_batch_is_local_times_world_size():
    _, plan = plan_of("--local-batch-size 8", world_size=3)
    assert (plan.global_batch_size, plan.accumulation, plan.steps_per_epoch) == (24, 1, 2083)


def test_given_the_gradient_is_accumulated():
    _, plan = plan_of("--local-batch-size 8 --global-batch-size 96", world_size=3)
    assert (plan.accumulation, plan.steps_per_epoch) == (4, 520)


@pytest.mark.parametrize(
    ("argv", "world_size", "words"),
    [
        ("--local-batch-size 4 --global-batch-size 10", 2, ["10", "4", "2", "8", "8 or 16"]),
        ("--local-batch-size 4 --global-batch-size 6", 2, ["6", "4", "2", "8", "--local-batch-size"]),
        ("--local-batch-size 50001", 1, ["50001", "50000"]),
    ],
)
def test_a_size_that_does_not_fit_is_answered_with_numbers(argv, world_size, words):
    with pytest.raises(UserError) as mistake:
        plan_of(argv, world_size)
    for word in words:
        assert word in str(mistake.value)


@pytest.mark.parametrize(("world_size", "local", "size"), [(1, 2000, 2000), (2, 1000, 2000), (3, 666, 1998)])
def test_a_recipe_that_states_its_global_batch_keeps_it_on_any_number_of_processes(world_size, local, size):
    config, plan = plan_of("--recipe speed94", world_size)
    assert (plan.local_batch_size, plan.global_batch_size, plan.accumulation) == (local, size, 1)
    assert base_learning_rate(config, plan) == 1340


def test_a_smaller_local_batch_of_such_a_recipe_accumulates():
    _, plan = plan_of("--recipe speed94 --local-batch-size 500", world_size=2)
    assert (plan.local_batch_size, plan.global_batch_size, plan.accumulation) == (500, 2000, 2)


def test_lr_scales_with_the_global_batch_unless_told_not_to():
    assert base_learning_rate(*plan_of("", world_size=4)) == pytest.approx(0.004)
    assert base_learning_rate(*plan_of("--lr 0.01 --global-batch-size 8")) == pytest.approx(0.02)
    assert base_learning_rate(*plan_of("--lr-scaling none", world_size=4)) == 0.001
    assert base_learning_rate(*plan_of("--recipe wide")) == 0.05


def test_the_cosine_goes_from_the_whole_rate_to_zero():
    config, plan = plan_of("--recipe wide --epochs 2 --warmup-epochs 0")
    total = plan.total_steps(config)
    rates = [learning_rate(config, plan, step) for step in (0, total // 2, total)]
    assert rates == pytest.approx([0.05, 0.025, 0.0])


def test_the_warm_up_grows_to_the_whole_rate_and_then_stays_out_of_the_way():
    config, plan = plan_of("--lr 1 --warmup-epochs 0.5 --local-batch-size 500 --lr-scaling none")
    rates = [learning_rate(config, plan, step) for step in (0, 24, 49, 50, 99)]
    assert rates == pytest.approx([0.02, 0.5, 1.0, 1.0, 1.0])


def test_the_constant_stays():
    config, plan = plan_of("")
    assert {learning_rate(config, plan, step) for step in (0, 1, 49_999)} == {0.001}


def test_the_banner_shows_the_arithmetic():
    batches, rate = describe(*plan_of("--global-batch-size 16", world_size=2))
    assert "4 local x 2 processes x 2 accumulated = 16 global" in batches
    assert "0.001 x 16 / 4 = 0.004" in rate
    assert "not scaled" in describe(*plan_of("--lr-scaling none", world_size=2))[1]
