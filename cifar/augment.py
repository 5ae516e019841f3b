"""Augmentation of whole batches on the device, as a function of (seed, epoch, image).

To add one, add a class with the methods of `Augmentation` here and a line to `AUGMENTATIONS`.
"""

import hashlib
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar.config import TrainConfig


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 62-bit seed for each (seed, purpose), e.g. `derive_seed(0, "augment", epoch)`.

    Randomness derived this way is a function: no generator state has to be saved or kept equal between ranks.
    """
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a CPU generator seeded for this purpose; its numbers are the same on every machine and rank."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


class Augmentation(Protocol):
    """Augment each training batch of `data.DeviceImages`."""

    def set_epoch(self, epoch: int) -> None:
        """Prepare the draws of `epoch`, a function of (seed, epoch)."""

    def __call__(self, images: Tensor, indices: Tensor) -> Tensor:
        """Return augmented `images`, uint8 [batch, 3, size, size], at int64 [batch] `indices` of the training set."""


class CropFlip:
    """A random crop, a horizontal flip of every other image on average, and optionally cutout.

    The draws of an epoch are tables with an entry for every training image, computed from (seed, epoch) alone: an image
    is augmented the same way on every rank and in every micro-batch.
    """

    def __init__(self, images: Tensor, seed: int, padding: int = 4, alternate: bool = False, cutout: int = 0) -> None:
        """Draw the tables of epoch 0.

        Args:
            images: the training images, uint8 [n, 3, size, size], of which it uses the shape and the device.
            padding: pixels by which an image may be shifted.
            alternate: flip each image in every other epoch instead of at random (arXiv 2404.00498, section 3.6), and
                pad with the reflected image instead of with black.
            cutout: side in pixels of a gray square, clipped at the edges; 0 for none (DeVries & Taylor 2017,
                arXiv 1708.04552).
        """
        self._images, self._seed = images, seed
        self._padding, self._alternate, self._cutout = padding, alternate, cutout
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the tables of `epoch`."""
        draws, device = generator(self._seed, "augment", epoch), self._images.device
        count, size = len(self._images), self._images.shape[-1]
        shifts = torch.randint(0, 2 * self._padding + 1, (2, count), generator=draws)
        flips = torch.randint(0, 2, (count,), generator=draws, dtype=torch.bool)
        self._centers = torch.randint(0, size, (2, count), generator=draws).to(device)
        if self._alternate:
            first = generator(self._seed, "flip")
            flips = torch.randint(0, 2, (count,), generator=first, dtype=torch.bool) ^ (epoch % 2 == 1)
        self._rows, self._columns = shifts.to(device)
        self._flips = flips.to(device)

    def __call__(self, images: Tensor, indices: Tensor) -> Tensor:
        """Return augmented `images`, uint8 [batch, 3, size, size], at int64 [batch] `indices` of the training set.

        The result is channels-last in memory; `images` should be, too, for speed.
        """
        (batch, channels, height, width), padding = images.shape, self._padding
        mode = "reflect" if self._alternate else "constant"
        # Crops are copied row by row: with channels last, a row is one run of bytes. A flipped crop is a crop of
        # the flipped image, measured from the other edge.
        both = F.pad(torch.cat((images, images.flip(3))), (padding,) * 4, mode)
        pixels = both.permute(0, 2, 3, 1).contiguous()  # [2 * batch, size + 2 * padding, size + 2 * padding, 3]
        flips, columns = self._flips[indices], self._columns[indices]
        columns = torch.where(flips, 2 * padding - columns, columns)
        chosen = torch.arange(batch, device=images.device) + batch * flips
        top = chosen * pixels.shape[1] + self._rows[indices]
        rows = top[:, None] + torch.arange(height, device=images.device)  # [batch, size], rows of `pixels`
        starts = rows * pixels.shape[2] + columns[:, None]
        runs = pixels.view(-1).unfold(0, width * channels, channels)  # a row from each pixel on
        crops = runs.index_select(0, starts.view(-1)).view(batch, height, width, channels).permute(0, 3, 1, 2)
        return crops if self._cutout == 0 else self._cut_out(crops, indices)

    def _cut_out(self, images: Tensor, indices: Tensor) -> Tensor:
        place = torch.arange(images.shape[3], device=images.device)
        first = self._centers[:, indices, None] - self._cutout // 2  # [2, batch, 1]
        rows, columns = (place >= first) & (place < first + self._cutout)
        gray = images.new_full((), 128)  # about zero after normalization
        return torch.where((rows[:, None, :, None] & columns[:, None, None, :]), gray, images)


def _crop_flip(config: TrainConfig, images: Tensor) -> Augmentation:
    alternate = config.augment == "crop-altflip"
    return CropFlip(images, config.seed, config.crop_padding, alternate, config.cutout)


# For each --augment, a function of the configuration and the training images, uint8 [n, 3, size, size], on the device.
AUGMENTATIONS: dict[str, Callable[[TrainConfig, Tensor], Augmentation | None]] = {
    "none": lambda *_: None,
    "crop-flip": _crop_flip,
    "crop-altflip": _crop_flip,
}
