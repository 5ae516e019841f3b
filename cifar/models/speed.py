"""A model made to train in few steps, after K. Jordan 2024 (arXiv 2404.00498), section 3."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SpeedNet(nn.Module):
    """A fixed whitening layer, three groups of convolutions and a linear layer; 1,971,352 trained parameters.

    Args:
        num_classes: number of outputs.
        widths: channels of the three groups.
        depth: convolutions in a group, 2 or more; with 3 or more, a residual connection skips all but the first.
    """

    def __init__(self, num_classes: int, widths: tuple[int, int, int] = (64, 256, 256), depth: int = 2) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)  # computed from the data, not trained; its bias is
        self.groups = nn.Sequential(
            *(_Group(before, width, depth) for before, width in zip((24, *widths), widths, strict=False))
        )
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        with torch.no_grad():
            self.head.weight.div_(self.head.weight.std())

    @torch.no_grad()
    def init_from_data(self, images: Tensor, eps: float = 1.2e-4) -> None:
        """Set the first layer to the whitening transform of 2 x 2 patches of `images`, float32 [n, 3, size, size].

        Its 24 channels are the 12 principal components of a patch, scaled to unit variance, and their negatives.
        `eps` is added to each component's variance to keep noise from being amplified. (The author's 5e-4 is for images
        of unit variance; pixels in [-1, 1] have a quarter of that.)
        """
        patches = F.unfold(images, 2).transpose(1, 2).reshape(-1, 12)
        mean = patches.mean(0)
        variances, components = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        whitening = (components / (variances + eps).sqrt()).T  # [12, 12], a component a row
        self.whiten.weight.copy_(torch.cat([whitening, -whitening]).view(24, 3, 2, 2))
        assert self.whiten.bias is not None
        self.whiten.bias.copy_(-torch.cat([whitening, -whitening]) @ mean)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, float [batch, num_classes], of normalized images, float [batch, 3, size, size]."""
        x = F.gelu(self.whiten(images))  # [batch, 24, 31, 31]
        x = self.groups(x)  # [batch, 256, 3, 3]
        x = F.max_pool2d(x, x.shape[2:]).flatten(1)
        return self.head(x) / x.shape[1]


class _Group(nn.Module):
    """Convolutions, each followed by BatchNorm and GELU; 2 x 2 max-pooling after the first."""

    def __init__(self, before: int, width: int, depth: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_conv(before if k == 0 else width, width) for k in range(depth))
        self.norms = nn.ModuleList(_norm(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norms[0](F.max_pool2d(self.convs[0](x), 2)))
        residual = x
        for conv, norm in zip(self.convs[1:-1], self.norms[1:-1], strict=True):
            x = F.gelu(norm(conv(x)))
        x = self.norms[-1](self.convs[-1](x))
        return F.gelu(x + residual if len(self.convs) > 2 else x)


def _conv(before: int, width: int) -> nn.Conv2d:
    conv = nn.Conv2d(before, width, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[:before])  # the first `before` outputs start as the identity
    return conv


def _norm(width: int) -> nn.BatchNorm2d:
    # A large momentum: in a run of few steps the weights change quickly, and the statistics must follow.
    norm = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm
