"""What two ranks find out together; started by test_ranks.py under torchrun. A failed assertion fails the run."""

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from cifar.batch_plan import BatchPlan
from cifar.config import TrainConfig
from cifar.data import EvalLoader, TrainLoader, load_data
from cifar.distributed.preemption import StopAgreement, StopRequest
from cifar.distributed.runtime import Runtime, ddp_options
from cifar.errors import UserError
from cifar.evaluation import evaluate
from cifar.loop import TrainState, train_step
from cifar.models import build_model
from cifar.optim import build_optimizer


def main() -> None:
    config = TrainConfig(device="cpu", dataset="synthetic", local_batch_size=8, global_batch_size=64, lr=0.1)
    runtime = Runtime(config)
    assert dist.get_backend() == "gloo"
    assert runtime.world_size == dist.get_world_size() == 2
    data = load_data(config, runtime)

    exchanges_gradients_once_a_step(config, runtime, data)
    compresses_gradients(runtime)
    has_one_bucket_for_powersgd(runtime)
    gives_every_rank_rank_zeros_weights(runtime)
    evaluates_with_rank_zeros_buffers(runtime, data)
    shares_mistakes_and_values(runtime)
    stops_after_the_same_step(runtime)
    runtime.print0("all is well")
    runtime.close()
    assert not dist.is_initialized()


def exchanges_gradients_once_a_step(config, runtime, data):
    plan = BatchPlan.make(config, runtime.world_size, len(data.train))
    assert plan.accumulation == 4
    loader = TrainLoader(data.train, plan, runtime.rank, seed=0)
    torch.manual_seed(0)
    net = build_model("net")
    model = runtime.wrap(net)
    assert isinstance(model, nn.parallel.DistributedDataParallel)
    exchanged = []

    def averaged(state, bucket):
        exchanged.append(bucket.buffer().numel())
        work = dist.all_reduce(bucket.buffer().div_(runtime.world_size), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    model.register_comm_hook(None, averaged)
    state = TrainState(net, build_optimizer(net, config), runtime.scaler)
    micro_batches = iter(loader)
    for _ in range(3):
        train_step(model, micro_batches, state, config, plan, runtime)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    assert sum(exchanged) == 3 * parameters, "4 micro-batches a step, and one exchange"
    weights = torch.cat([parameter.flatten() for parameter in net.parameters()]).detach()
    assert torch.equal(runtime.mean(weights.clone()), weights), "the ranks' weights drifted apart"


def compresses_gradients(runtime):
    """Through each hook: the mean over the ranks, as exact as the hook promises."""
    gradients = {}
    for name in ("none", "fp16", "bf16", "powersgd"):
        runtime.accelerator.ddp_handler = ddp_options(name)
        torch.manual_seed(0)
        net = nn.Linear(300, 200, bias=False)
        model = runtime.wrap(net)
        for _ in range(30):  # PowerSGD begins after 20
            net.zero_grad()
            images = torch.randn(8, 300, generator=torch.Generator().manual_seed(runtime.rank))
            model(images).pow(3).sum().backward()
        gradients[name] = net.weight.grad.clone()
    runtime.accelerator.ddp_handler = ddp_options("none")
    exact = gradients["none"]
    for name, most in {"fp16": 2e-3, "bf16": 1e-2}.items():
        error = ((gradients[name] - exact).norm() / exact.norm()).item()
        assert 1e-6 < error < most, (name, error)
    assert torch.linalg.matrix_rank(exact) > 4
    assert torch.linalg.matrix_rank(gradients["powersgd"], rtol=1e-4) == 4


def has_one_bucket_for_powersgd(runtime):
    """With two, ranks were seen to wait for each other for good."""
    runtime.accelerator.ddp_handler = ddp_options("powersgd")
    buckets = []
    net = build_model("net-wide")
    model = runtime.wrap(net)
    for _ in range(3):  # buckets are laid out anew after the first step
        model(torch.randn(4, 3, 32, 32)).sum().backward()
        sizes = model._get_ddp_logging_data()
        buckets.append((sizes["bucket_sizes"], sizes.get("rebuilt_bucket_sizes", "")))
    runtime.accelerator.ddp_handler = ddp_options("none")
    whole = str(4 * sum(parameter.numel() for parameter in net.parameters()))
    assert buckets[-1] == (whole, whole), buckets


def gives_every_rank_rank_zeros_weights(runtime):
    torch.manual_seed(runtime.rank)  # ranks that start differently
    net = nn.Linear(3, 3)
    runtime.wrap(net)
    norms = runtime.gather(net.weight.norm().item())
    assert len(set(norms)) == 1


def evaluates_with_rank_zeros_buffers(runtime, data):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3072)
    net = nn.Sequential(nn.Flatten(), norm, nn.Linear(3072, 10))
    mean = norm.get_buffer("running_mean")
    mean.fill_(runtime.rank / 2)
    test = evaluate(net, EvalLoader(data.test, runtime.rank, runtime.world_size), runtime)
    assert mean.max() == 0, "rank zero's"
    assert len(set(runtime.gather((test.loss, test.correct)))) == 1

    class Alone:
        """This rank by itself over all images: the metrics have to be those of both together."""

        device = runtime.device

        def broadcast_buffers(self, net):
            pass

        def sum(self, tensor):
            return tensor

    alone = evaluate(net, EvalLoader(data.test, 0, 1), Alone())
    assert (alone.correct, alone.total) == (test.correct, 10_000)
    assert abs(alone.loss - test.loss) < 1e-6


def shares_mistakes_and_values(runtime):
    assert runtime.gather(runtime.rank * 10) == [0, 10]
    assert runtime.from_main("zero" if runtime.is_main else None) == "zero"
    with pytest.raises(UserError, match="only rank one noticed"), runtime.fail_together():  # on both
        raise_on_rank_one(runtime)


def stops_after_the_same_step(runtime):
    request = StopRequest(runtime.launch)  # not begun: nothing but this test asks
    agreement = StopAgreement(runtime, request)
    stopped = None
    for step in range(1, 2000):
        time.sleep(0.001 * (1 + runtime.rank))  # ranks that aren't in step by themselves
        if step == 500 and runtime.rank == 1:
            request.name = "SIGTERM"
        if agreement.after_step():
            stopped = step
            break
    assert stopped is not None
    assert stopped > 500
    assert len(set(runtime.gather(stopped))) == 1


def raise_on_rank_one(runtime):
    if runtime.rank == 1:
        raise UserError("only rank one noticed")


if __name__ == "__main__":
    main()
