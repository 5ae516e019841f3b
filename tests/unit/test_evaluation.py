"""The test metrics: right, and the same for every way to share out the images."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifar.data import EvalLoader, normalize
from cifar.evaluation import Evaluation, evaluate
from cifar.models import build_model


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(1)
    return build_model("net")


def test_the_metrics_are_those_of_one_plain_pass(net, synthetic, runtime):
    got = evaluate(net, EvalLoader(synthetic.test, 0, 1), runtime)
    with torch.no_grad():
        scores = net(normalize(synthetic.test.images))
    predicted, labels = scores.argmax(1), synthetic.test.labels
    assert got.total == 10_000
    assert torch.equal(got.predicted, predicted)
    assert got.correct == int((predicted == labels).sum())
    assert got.loss == pytest.approx(F.cross_entropy(scores, labels).item(), abs=2e-6)
    assert torch.allclose(got.confidence.float(), scores.softmax(1).max(1).values, atol=2e-6)


class Simulated:
    """A runtime of several ranks in one process: keeps what each contributes and adds the kept to the last's."""

    def __init__(self, runtime, world_size):
        self.device, self.world_size, self.kept = runtime.device, world_size, []

    def broadcast_buffers(self, net):
        pass

    def sum(self, tensor):
        self.kept.append(tensor.clone())
        return torch.stack(self.kept).sum(0)


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_every_share_out_gives_the_same_to_the_last_bit(net, synthetic, runtime, world_size):
    whole = evaluate(net, EvalLoader(synthetic.test, 0, 1), runtime)
    ranks = Simulated(runtime, world_size)
    for rank in range(world_size):
        loader = EvalLoader(synthetic.test, rank, world_size)
        if rank < world_size - 1:
            with pytest.raises(RuntimeError, match="should have been seen once"):
                evaluate(net, loader, ranks)  # no rank alone has seen every image
        else:
            shared = evaluate(net, loader, ranks)
    assert shared.correct == whole.correct
    assert shared.loss == pytest.approx(whole.loss, abs=1e-7)
    assert torch.equal(shared.predicted, whole.predicted)


def test_an_image_seen_twice_is_found(net, synthetic, runtime):
    ranks = Simulated(runtime, 2)
    ranks.kept.append(torch.zeros(10_000, 5, dtype=torch.int64))
    ranks.kept[0][17, 0] = 1
    with pytest.raises(RuntimeError, match=r"\[0, 9999, 1\]"):
        evaluate(net, EvalLoader(synthetic.test, 0, 1), ranks)


def test_evaluation_leaves_the_net_as_it_was(synthetic, runtime):
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3072), nn.Dropout(0.5), nn.Linear(3072, 10))
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first = evaluate(net, EvalLoader(synthetic.test, 0, 1), runtime)
    assert net.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    again = evaluate(net, EvalLoader(synthetic.test, 0, 1), runtime)
    assert torch.equal(first.predicted, again.predicted), "dropout was on"


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_net_has_no_finite_loss(synthetic, runtime, broken):
    torch.manual_seed(0)
    net = build_model("net")
    with torch.no_grad():
        net.fc3.bias[0] = broken
    got = evaluate(net, EvalLoader(synthetic.test, 0, 1), runtime)
    assert math.isnan(got.loss)
    assert got.total == 10_000


def made(labels, predicted, confidence):
    return Evaluation(0.0, torch.tensor(labels), torch.tensor(predicted), torch.tensor(confidence))


def test_confusion_and_class_accuracies():
    labels = list(range(10)) * 2
    predicted = [*range(10), 1, 1, *range(2, 10)]
    got = made(labels, predicted, [0.5] * 20)
    confusion = got.confusion()
    assert confusion.sum() == 20
    assert confusion[0].tolist() == [1, 1] + [0] * 8  # class 0 was once taken for 1
    assert got.class_accuracies() == [0.5] + [1.0] * 9
    assert got.accuracy == 0.95


def test_the_most_confidently_wrong_come_first_and_the_right_never():
    got = made([0, 0, 0, 0], [1, 0, 2, 3], [0.3, 0.9, 0.8, 0.5])
    assert got.most_confidently_wrong(2) == [2, 3]
    assert got.most_confidently_wrong(9) == [2, 3, 0]
