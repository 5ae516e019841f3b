"""Checks that need two ranks; run by test_ranks.py as python -m tests.helpers.worker. A failed check fails it."""

import os
import threading
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from cifar import explain
from cifar.config import TrainConfig
from cifar.data import Data, load_data
from cifar.datasets import synthetic
from cifar.distributed.ddp import ddp_options
from cifar.distributed.runtime import Runtime
from cifar.errors import TrainingDivergedError, UserError
from cifar.evaluation import evaluate
from cifar.models import MODELS, build_model
from cifar.optim import build_optimizer
from tests.helpers.forking import fork_ranks
from train_ddp import main, train_step


def check_two_ranks() -> None:
    """Run all checks in this rank."""
    config = TrainConfig(device="cpu", dataset="synthetic", local_batch_size=8, global_batch_size=64, lr=0.1)
    runtime = Runtime(config)
    assert dist.get_backend() == "gloo"
    assert runtime.world_size == dist.get_world_size() == 2
    data = load_data(config, runtime)
    check_one_exchange_per_step(config, runtime, data)
    check_compression(runtime)
    check_one_bucket_for_powersgd(runtime)
    check_evaluation_averages_the_buffers(runtime, data)
    check_host_collectives(runtime)
    runtime.print0("two ranks passed")
    runtime.close()
    assert not dist.is_initialized()


def check_one_exchange_per_step(config: TrainConfig, runtime: Runtime, data: Data) -> None:
    """Four micro-batches a step and one all-reduce; the weights stay equal, from rank zero's."""
    assert data.plan.accumulation == 4
    torch.manual_seed(runtime.rank)  # ranks that start differently
    net = build_model("net", 10)
    model = runtime.prepare(net)
    assert isinstance(model, nn.parallel.DistributedDataParallel)
    exchanged = []

    def average(state, bucket):
        exchanged.append(bucket.buffer().numel())
        work = dist.all_reduce(bucket.buffer().div_(runtime.world_size), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    model.register_comm_hook(None, average)
    optimizer, steps = build_optimizer(net, config), iter(data.train)
    for _ in range(3):
        train_step(model, next(steps), 64, optimizer, runtime)
    assert sum(exchanged) == 3 * sum(parameter.numel() for parameter in net.parameters())
    weights = torch.cat([parameter.flatten() for parameter in net.parameters()]).detach()
    assert torch.equal(runtime.mean(weights.clone()), weights), "the ranks' weights differ"


def check_compression(runtime: Runtime) -> None:
    """Each hook averages over the ranks, as exactly as it promises."""
    gradients = {}
    for name in ("none", "batched", "fp16", "bf16", "powersgd"):
        hook, batched = ("none", True) if name == "batched" else (name, False)
        runtime.accelerator.ddp_handler = ddp_options(hook, batched)
        torch.manual_seed(0)
        net = nn.Linear(300, 200, bias=False)
        model = runtime.prepare(net)
        for _ in range(30):  # PowerSGD begins after 20
            net.zero_grad()
            images = torch.randn(8, 300, generator=torch.Generator().manual_seed(runtime.rank))
            model(images).pow(3).sum().backward()
        assert net.weight.grad is not None
        gradients[name] = net.weight.grad.clone()
    exact = gradients["none"]
    assert torch.equal(gradients["batched"], exact)
    for name, most in {"fp16": 2e-3, "bf16": 1e-2}.items():
        error = ((gradients[name] - exact).norm() / exact.norm()).item()
        assert 1e-6 < error < most, (name, error)
    assert torch.linalg.matrix_rank(exact) > 4
    assert torch.linalg.matrix_rank(gradients["powersgd"], rtol=1e-4) == 4


def check_one_bucket_for_powersgd(runtime: Runtime) -> None:
    """With two buckets, ranks deadlocked."""
    net = build_model("net-wide", 10)
    model = runtime.prepare(net)
    buckets = []
    for _ in range(3):  # DDP rebuilds its buckets after the first step
        model(torch.randn(4, 3, 32, 32)).sum().backward()
        sizes = model._get_ddp_logging_data()  # type: ignore[operator]
        buckets.append((sizes["bucket_sizes"], sizes.get("rebuilt_bucket_sizes", "")))
    runtime.accelerator.ddp_handler = ddp_options("none")
    whole = str(4 * sum(parameter.numel() for parameter in net.parameters()))
    assert buckets[-1] == (whole, whole), buckets


def check_evaluation_averages_the_buffers(runtime: Runtime, data: Data) -> None:
    """The metrics of both ranks equal those of one process with the mean of their buffers."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3072)
    net = nn.Sequential(nn.Flatten(), norm, nn.Linear(3072, 10))
    norm.get_buffer("running_mean").fill_(runtime.rank / 2)
    test = evaluate(net, data.test, runtime)
    assert norm.get_buffer("running_mean").unique().tolist() == [0.25]
    assert len(set(runtime.gather((test.loss, test.correct)))) == 1
    images, labels = data.test.dataset[torch.arange(synthetic.TEST_SIZE)]
    with torch.no_grad():
        logits = net.eval()(images)
    assert (test.correct, test.total) == ((logits.argmax(1) == labels).sum(), synthetic.TEST_SIZE)
    assert abs(nn.functional.cross_entropy(logits, labels).item() - test.loss) < 1e-6


def check_host_collectives(runtime: Runtime) -> None:
    """A mistake of one rank is raised on both."""
    assert runtime.gather(runtime.rank * 10) == [0, 10]
    assert runtime.from_main("zero" if runtime.is_main else None) == "zero"

    def fail_on_rank_one() -> None:
        if runtime.rank == 1:
            raise UserError("only rank one noticed")

    with pytest.raises(UserError, match="only rank one noticed"), runtime.fail_together():
        fail_on_rank_one()


def check_missing_rank_is_waited_for_no_longer_than_the_timeout() -> None:
    """While a run trains; at the start, ranks wait for a download."""
    runtime = Runtime(TrainConfig(device="cpu", timeout=5))
    runtime.end_start()
    if runtime.rank == 1:
        time.sleep(8)
        return
    with pytest.raises(RuntimeError, match="Timed out"):
        runtime.gather(None)


FLAGS = ["--dataset", "synthetic", "--device", "cpu", "--wandb", "disabled", "--log-steps", "10"]


def check_runs_in_turn() -> None:
    """A run that fails on all ranks leaves nothing behind in their processes: the next one trains."""
    with pytest.raises(TrainingDivergedError):
        main([*FLAGS, "--max-steps", "20", "--lr", "1e30"])
    assert not dist.is_initialized()
    assert not [thread for thread in threading.enumerate() if thread.name in ("heartbeat", "stop-request")]
    main([*FLAGS, "--max-steps", "20"])
    assert not dist.is_initialized()


def check_separate_copies_are_found() -> None:
    """Without cpu=True, accelerate on a host without GPUs takes each process for rank 0 of 1."""
    with (
        patch("cifar.distributed.ddp.Accelerator", lambda cpu, **rest: Accelerator(**rest)),
        pytest.raises(UserError, match="started 2 processes but 1 would train together"),
    ):
        main([*FLAGS, "--max-steps", "1", "--run-dir", "separate"])
    assert not Path("separate").exists()
    time.sleep(3)  # the other rank may still be connecting


def check_slow_start_of_wandb_does_not_end_the_run() -> None:
    """Rank one waits for rank zero, longer than for a step."""
    with patch("cifar.records.tracking.WandbRun.start", lambda *_: time.sleep(7 * (os.environ["RANK"] == "0"))):
        main([*FLAGS, "--max-steps", "3", "--timeout", "5"])


DRAWN: list[float] = []


class Noise(nn.Linear):
    """A linear model that draws a number in each step."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training and len(images) == 4:
            DRAWN.append(torch.rand(()).item())
        return super().forward(images.flatten(1))


def check_random_layers_draw_other_numbers_on_each_rank() -> None:
    """And in each step."""
    with patch.dict(MODELS, net=lambda classes: Noise(3072, classes)):
        main([*FLAGS, "--max-steps", "3"])
    runtime = Runtime(TrainConfig(device="cpu"))
    first, second = runtime.gather(DRAWN)
    runtime.close()
    assert len({*first, *second}) == len(first) + len(second) == 6


if __name__ == "__main__":
    synthetic.TRAIN_SIZE, synthetic.TEST_SIZE = 2_000, 1_001
    for check in (
        check_two_ranks,
        check_missing_rank_is_waited_for_no_longer_than_the_timeout,
        check_runs_in_turn,
        check_separate_copies_are_found,
        check_slow_start_of_wandb_does_not_end_the_run,
        check_random_layers_draw_other_numbers_on_each_rank,
        lambda: explain.main(["--dataset", "synthetic", "--device", "cpu"]),
    ):
        fork_ranks(2, check)
