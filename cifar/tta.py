"""Test-time augmentation: the class scores of an image as the mean over views of it (arXiv 2404.00498, section 3.5)."""

import torch.nn.functional as F
from torch import Tensor, nn


def augmented_scores(net: nn.Module, images: Tensor, tta: str) -> Tensor:
    """Class scores, float [batch, 10], of normalized images, float32 [batch, 3, 32, 32].

    Args:
        tta: "none"; "flip": the mean over an image and its mirror image; "crop": half of that, and half of the same
            for the image moved by a pixel up and left, and down and right: six views.
    """
    if tta == "none":
        return net(images)
    if tta == "flip":
        return (net(images) + net(images.flip(3))) / 2
    padded = F.pad(images, (1, 1, 1, 1), "reflect")
    moved = [augmented_scores(net, view, "flip") for view in (padded[:, :, :-2, :-2], padded[:, :, 2:, 2:])]
    return augmented_scores(net, images, "flip") / 2 + (moved[0] + moved[1]) / 4
