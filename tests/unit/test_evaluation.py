"""The test metrics: exact, at every world size. Real ranks are in test_torchrun.py and test_world_size.py."""

import contextlib
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifar.data import EvalLoader, normalize
from cifar.evaluation import Evaluation, augmented_logits, evaluate
from cifar.models import build_model


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(1)
    return build_model("net", 10)


def test_metrics_equal_one_plain_pass(net, synthetic, runtime):
    got, test = evaluate(net, synthetic.test, runtime), synthetic.test.dataset
    with torch.no_grad():
        logits = net(normalize(test.images))
    predicted = logits.argmax(1)
    assert got.total == 1_000
    assert torch.equal(got.predicted, predicted)
    assert got.correct == int((predicted == test.labels).sum())
    assert got.loss == pytest.approx(F.cross_entropy(logits, test.labels).item(), abs=2e-6)
    assert torch.allclose(got.confidence.float(), logits.softmax(1).max(1).values, atol=2e-6)


class Simulated:
    """A runtime whose sum adds what the ranks before have contributed."""

    def __init__(self, runtime, world_size):
        self.device, self.world_size, self.kept, self.lines = runtime.device, world_size, [], []
        self.print0 = self.lines.append

    @property
    def rank(self):
        return len(self.kept)

    def average_buffers(self, net):
        pass

    def sum(self, tensor):
        self.kept.append(tensor.clone())
        return torch.stack(self.kept).sum(0)


def evaluate_on(ranks, nets, test, *tta):
    """Return the evaluation of the last rank, which adds the shards of all; each rank has its net of `nets`."""
    for rank, net in enumerate(nets):
        # No rank alone has seen every image.
        early = pytest.raises(RuntimeError, match="each must be counted once")
        with early if rank < len(nets) - 1 else contextlib.nullcontext():
            shared = evaluate(net, EvalLoader(test.dataset, rank, len(nets)), ranks, *tta)
    return shared


@pytest.mark.parametrize(("world_size", "tta"), [(2, "none"), (3, "none"), (7, "none"), (2, "crop"), (3, "crop")])
def test_world_size_changes_no_bit(net, synthetic, runtime, world_size, tta):
    views = (tta, evaluate(net, synthetic.test, runtime)) if tta != "none" else ()
    whole = evaluate(net, synthetic.test, runtime, *views)
    shared = evaluate_on(Simulated(runtime, world_size), [net] * world_size, synthetic.test, *views)
    assert shared.loss == pytest.approx(whole.loss, abs=1e-7)
    assert torch.equal(shared.predicted, whole.predicted)


def test_image_counted_twice_is_an_error(net, synthetic, runtime):
    ranks = Simulated(runtime, 2)
    ranks.kept.append(torch.zeros(1_002, 5, dtype=torch.int64))
    ranks.kept[0][17, 0] = 1
    with pytest.raises(RuntimeError, match=r"\[0, 999, 1\]"):
        evaluate(net, synthetic.test, ranks)


def test_rank_with_other_weights_is_named(net, synthetic, runtime):
    """Rank 1's differ from the others' in the last bit of one weight."""
    ranks, other = Simulated(runtime, 3), copy.deepcopy(net)
    bias = other.fc3.bias.data
    bias[0] = torch.nextafter(bias[0], bias[0] + 1)
    evaluate_on(ranks, [net, other, net], synthetic.test)
    (line,) = ranks.lines
    assert line.startswith("WARNING: the weights of rank 1 differ from rank zero's")


def test_model_is_left_unchanged(synthetic, runtime):
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3072), nn.Dropout(0.5), nn.Linear(3072, 10)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first, again = (evaluate(net, synthetic.test, runtime) for _ in "12")
    assert net.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(first.predicted, again.predicted), "dropout was on"


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_infinite_loss_is_nan(synthetic, runtime, broken):
    net = build_model("net", 10)
    with torch.no_grad():
        net.fc3.bias[0] = broken
    got = evaluate(net, synthetic.test, runtime)
    assert math.isnan(got.loss)
    assert got.total == 1_000


def test_confusion_class_accuracies_and_most_confidently_wrong():
    labels, predicted = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([1, 0, 2, 3, 1])
    got = Evaluation(torch.zeros(5), labels, predicted, torch.tensor([0.3, 0.9, 0.8, 0.5, 1.0]), tuple("abcd"))
    assert got.confusion().tolist() == [[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    expected = {"a": 0.25, "b": 1.0, "c": math.nan, "d": math.nan}  # two have no images
    assert got.class_accuracies() == pytest.approx(expected, nan_ok=True)
    assert got.accuracy == 2 / 5
    assert got.most_confidently_wrong(2) == [2, 3]
    assert got.most_confidently_wrong(9) == [2, 3, 0]


def test_time_augmentation():
    """On a model whose logits are the ten pixels in the upper left corner of an image."""
    images = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    padded = F.pad(images, (1, 1, 1, 1), "reflect")

    def corner(images):
        return images[:, 0, 0, :10]

    def both(images):
        return (corner(images) + corner(images.flip(3))) / 2

    shifted = both(padded[:, :, :32, :32]) / 4 + both(padded[:, :, 2:, 2:]) / 4
    expected = {"none": corner(images), "flip": both(images), "crop": both(images) / 2 + shifted}
    for tta, logits in expected.items():
        assert torch.allclose(augmented_logits(corner, images, tta), logits, atol=1e-6), tta


def test_views_of_the_least_certain_quarter(net, synthetic, runtime):
    plain, test = evaluate(net, synthetic.test, runtime), synthetic.test.dataset
    got = evaluate(net, synthetic.test, runtime, "crop")
    with torch.no_grad():
        logits = augmented_logits(net, normalize(test.images), "crop")
    uncertain = torch.zeros(1_000, dtype=torch.bool)
    uncertain[plain.confidence.argsort(stable=True)[:250]] = True
    assert torch.equal(got.predicted[uncertain], logits.argmax(1)[uncertain])
    assert torch.allclose(got.confidence[uncertain].float(), logits.softmax(1).max(1).values[uncertain], atol=2e-6)
    for name in ("losses", "predicted", "confidence"):
        assert torch.equal(getattr(got, name)[~uncertain], getattr(plain, name)[~uncertain]), name
        assert not torch.equal(getattr(got, name), getattr(plain, name)), name
