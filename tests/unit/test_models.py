"""The nets of the fast recipes, and test-time augmentation."""

import pytest
import torch
import torch.nn.functional as F

from cifar.evaluation import augmented_scores
from cifar.models import MODELS, build_model

IMAGES = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("name", MODELS)
def test_every_net_scores_ten_classes_and_learns_from_a_batch(name):
    torch.manual_seed(0)
    net = build_model(name, IMAGES)
    scores = net(IMAGES[:4])
    assert scores.shape == (4, 10)
    scores.logsumexp(1).sum().backward()
    for parameter_name, parameter in net.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name


@pytest.mark.parametrize(("name", "parameters"), [("resnet18", 11_173_962), ("speed", 1_971_352 + 288 + 1152)])
def test_sizes(name, parameters):
    assert sum(parameter.numel() for parameter in build_model(name).parameters()) == parameters


def test_the_whitening_layer_whitens():
    net = build_model("speed", IMAGES)
    patches = net.whiten(IMAGES)[:, :12].transpose(0, 1).flatten(1).detach()
    assert torch.allclose(patches.mean(1), torch.zeros(12), atol=1e-3)
    assert torch.allclose(patches.cov(), torch.eye(12), atol=1e-2)
    assert torch.allclose(net.whiten(IMAGES)[:, 12:], -net.whiten(IMAGES)[:, :12], atol=1e-5)


def test_convolutions_begin_by_passing_their_inputs_on():
    conv = build_model("speed").groups[1].convs[0]  # 64 to 256 channels
    x = torch.rand(2, 64, 8, 8)
    assert torch.allclose(conv(x)[:, :64], x, atol=1e-5)


def test_a_seed_gives_one_net():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([parameter.flatten() for parameter in build_model("speed", IMAGES).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def first_pixel(images):
    """A "net" whose scores are the ten pixels in the image's upper left corner."""
    return images[:, 0, 0, :10]


def test_without_augmentation_the_scores_are_the_nets():
    assert torch.equal(augmented_scores(first_pixel, IMAGES, "none"), first_pixel(IMAGES))


def test_flip_is_the_mean_over_both_ways():
    mirrored = torch.flip(IMAGES, dims=(3,))
    expected = (first_pixel(IMAGES) + first_pixel(mirrored)) / 2
    assert torch.allclose(augmented_scores(first_pixel, IMAGES, "flip"), expected)


def test_crop_is_the_weighted_mean_over_six_views():
    padded = F.pad(IMAGES, (1, 1, 1, 1), "reflect")
    views = {(1, 1): 1 / 4, (0, 0): 1 / 8, (2, 2): 1 / 8}
    expected = sum(
        weight * (first_pixel(view) + first_pixel(view.flip(3)))
        for (row, column), weight in views.items()
        for view in [padded[:, :, row : row + 32, column : column + 32]]
    )
    assert torch.allclose(augmented_scores(first_pixel, IMAGES, "crop"), expected, atol=1e-6)
