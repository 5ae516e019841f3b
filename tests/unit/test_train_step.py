"""How loss, gradients and optimizer hang together: each sentence of the README's section is pinned here."""

import copy

import pytest
import torch
import torch.nn.functional as F

from cifar.batch_plan import BatchPlan
from cifar.config import parse_args
from cifar.loop import TrainState, forward_backward, train_step
from cifar.models import build_model
from cifar.optim import build_optimizer


@pytest.fixture
def net():
    torch.manual_seed(0)
    return build_model("net")


@pytest.fixture
def batch(synthetic):
    return synthetic.train[torch.arange(8)]


@pytest.fixture
def scaler():
    return torch.amp.GradScaler("cpu", enabled=False)


def test_the_optimizer_holds_the_parameters_themselves(net):
    optimizer = build_optimizer(net, parse_args([]))
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == 10
    assert all(a is b for a, b in zip(held, net.parameters(), strict=True))


def test_the_optimizer_reads_grad_and_nothing_else(net):
    optimizer = build_optimizer(net, parse_args(["--lr", "0.5", "--momentum", "0"]))
    before = copy.deepcopy(net.state_dict())
    optimizer.step()  # no .grad: nothing to do
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    net.fc3.bias.grad = torch.ones(10)  # no loss and no backward were ever needed
    optimizer.step()
    assert torch.allclose(net.fc3.bias, before["fc3.bias"] - 0.5)
    assert torch.equal(net.fc3.weight, before["fc3.weight"])


def test_sgd_moves_each_parameter_by_lr_times_its_buffer(net, batch, scaler):
    lr, momentum = 0.1, 0.9
    optimizer = build_optimizer(net, parse_args(["--lr", str(lr)]))
    expected_buffers = {}
    for _ in range(3):
        optimizer.zero_grad()
        forward_backward(net, *batch, scaler, 1.0)
        before = copy.deepcopy(net.state_dict())
        optimizer.step()
        for name, parameter in net.named_parameters():
            old = expected_buffers.get(name)
            expected_buffers[name] = parameter.grad if old is None else momentum * old + parameter.grad
            buffer = optimizer.state[parameter]["momentum_buffer"]
            assert torch.allclose(buffer, expected_buffers[name], atol=1e-7)
            assert torch.allclose(parameter, before[name] - lr * buffer, atol=1e-7)


def test_gradients_of_two_backward_calls_add_up():
    x = torch.zeros(2, requires_grad=True)
    assert x.grad is None
    x.mean().backward()
    assert x.grad.tolist() == [0.5, 0.5]
    x.mean().backward()
    assert x.grad.tolist() == [1.0, 1.0]


def test_zero_grad_makes_grad_none_again(net, batch, scaler):
    optimizer = build_optimizer(net, parse_args([]))
    forward_backward(net, *batch, scaler, 1.0)
    assert all(parameter.grad is not None for parameter in net.parameters())
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in net.parameters())


def two_steps(net, runtime, batches, forget_zero_grad):
    config = parse_args(["--lr", "0.1", "--momentum", "0"])
    optimizer = build_optimizer(net, config)
    if forget_zero_grad:
        optimizer.zero_grad = lambda: None
    state = TrainState(net, optimizer, runtime.scaler)
    plan = BatchPlan.make(config, 1, 50_000)
    for batch in batches:
        train_step(net, iter([batch]), state, config, plan, runtime)
    return net


def test_skipping_zero_grad_changes_the_result(net, runtime, synthetic):
    batches = [synthetic.train[torch.arange(8 * i, 8 * i + 8)] for i in range(2)]
    right = two_steps(copy.deepcopy(net), runtime, batches, forget_zero_grad=False)
    wrong = two_steps(copy.deepcopy(net), runtime, batches, forget_zero_grad=True)
    assert not torch.allclose(right.fc3.weight, wrong.fc3.weight, atol=1e-4)
    # ... namely by the first step's gradient, which is applied a second time
    first = two_steps(copy.deepcopy(net), runtime, batches[:1], forget_zero_grad=False)
    again = first.fc3.weight - net.fc3.weight
    assert torch.allclose(wrong.fc3.weight, right.fc3.weight + again, atol=1e-6)


def test_accumulating_over_k_micro_batches_equals_one_batch_k_times_as_large(net, runtime, synthetic):
    def trained(local, size):
        own = copy.deepcopy(net)
        config = parse_args(["--lr", "0.1", "--lr-scaling", "none", "--local-batch-size", str(local),
                             "--global-batch-size", str(size)])  # fmt: skip
        state = TrainState(own, build_optimizer(own, config), runtime.scaler)
        micro_batches = iter([synthetic.train[rows] for rows in torch.arange(3 * size).split(local)])
        for _ in range(3):
            train_step(own, micro_batches, state, config, BatchPlan.make(config, 1, 50_000), runtime)
        mean_loss = state.window_loss / 3 / (size // local)
        return own, mean_loss

    (whole, loss), (parts, loss_of_parts) = trained(32, 32), trained(8, 32)
    assert torch.allclose(loss, loss_of_parts, atol=1e-5)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert not torch.allclose(whole.fc3.weight, net.fc3.weight, atol=1e-3), "nothing was trained"


@pytest.mark.parametrize("moved", ["net", "images", "labels"])
def test_net_and_both_tensors_must_be_on_one_device(net, batch, moved):
    images, labels = batch
    # The meta device stands in for a second one where there is no GPU: like CUDA, it takes no CPU tensors.
    away = "cuda" if torch.cuda.is_available() else "meta"
    net = net.to(away) if moved == "net" else net
    images = images.to(away) if moved == "images" else images
    labels = labels.to(away) if moved == "labels" else labels
    with pytest.raises((RuntimeError, NotImplementedError)):
        F.cross_entropy(net(images), labels).item()
    F.cross_entropy(build_model("net")(batch[0]), batch[1]).item()  # on one device it works
