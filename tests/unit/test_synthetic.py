"""The stand-in: the same bytes on every machine, balanced, and learnable."""

import hashlib

import pytest
import torch
import torch.nn.functional as F

from cifar.data import normalize
from cifar.datasets.synthetic import make_synthetic
from cifar.models import build_model


@pytest.fixture(scope="module")
def made():
    return make_synthetic()


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def test_shapes_and_types_are_cifar10s(made):
    for (images, labels), count in zip(made, (50_000, 10_000), strict=True):
        assert images.shape == (count, 3, 32, 32)
        assert images.dtype == torch.uint8
        assert images.is_contiguous()
        assert labels.shape == (count,)
        assert labels.dtype == torch.int64


def test_the_same_bytes_on_every_machine(made):
    """Whoever changes these changes the meaning of every accuracy measured on the stand-in so far."""
    (train_images, train_labels), (test_images, test_labels) = made
    assert digest(train_images) == "de1cc4c7f6dd403919e8e735fe61436f0b85735fa919d024766693e783ed823f"
    assert digest(train_labels) == "0564108d32ab7d6a9b64b6a12f45ae3ecf4dfd24fc00844ca7e0fc83d4b01a87"
    assert digest(test_images) == "a7a4be29fd1a4453baf34bbf0bbbd9ae06199f9f93af1296600f570313645fcb"
    assert digest(test_labels) == "d44b31c1b2df81aef6bbe6207b31351954183c0e29cd92cf2c5ac3af51652dc4"


def test_draws_nothing_from_torchs_generator(made):
    """Making it neither depends on the run's seed nor moves its generator."""
    torch.manual_seed(7)
    before = torch.get_rng_state()
    (images, _), _ = make_synthetic()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(images, made[0][0])


def test_ten_classes_about_equally_often(made):
    for _, labels in made:
        counts = torch.bincount(labels, minlength=10)
        assert len(counts) == 10
        expected = len(labels) / 10
        assert (counts - expected).abs().max() < 4 * (0.9 * expected) ** 0.5  # four standard deviations


def test_test_images_are_not_those_trained_on(made):
    """Every draw is independent, so that a handful in 10,000 coincides by chance, and no more."""
    train, test = ({row.tobytes() for row in images.flatten(1).numpy()} for images, _ in made)
    assert len(train & test) < 10
    assert len(train) > 49_950
    assert len(test) > 9_990


def test_uses_the_whole_range_around_the_middle(made):
    """Like photographs: dark and bright, neither flat nor saturated."""
    (images, _), _ = made
    pixels = images[:5000].float()
    assert 110 < pixels.mean() < 145
    assert pixels.std() > 40
    assert ((pixels == 0) | (pixels == 255)).float().mean() < 0.1


@pytest.fixture
def one_thread():
    """Small batches gain nothing from a second core, and lose much where it is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_the_net_learns_it(made):
    """A short training, 300 steps: far above chance on images it has not seen, and far from all of them."""
    (images, labels), (test_images, test_labels) = made
    torch.manual_seed(0)
    net = build_model("net")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.03, momentum=0.9)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    for batch in order[:19_200].split(64):
        optimizer.zero_grad()
        F.cross_entropy(net(normalize(images[batch])), labels[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        right = net(normalize(test_images[:5000])).argmax(1) == test_labels[:5000]
    assert 0.35 < right.float().mean() < 0.95
