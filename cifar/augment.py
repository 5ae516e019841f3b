"""Augmentation of whole batches, on the device, as a pure function of (seed, epoch, image)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar.seeds import generator

PADDING = 4


class CropFlip:
    """A random crop with padding 4, then a horizontal flip for one image in two.

    The draws of an epoch are a table with a row for every training image, computed from (seed, epoch) alone:
    whichever rank meets an image, in whichever micro-batch, does the same to it.
    """

    def __init__(self, size: int, seed: int, device: torch.device) -> None:
        """`size` is the number of training images."""
        self._size, self._seed, self._device = size, seed, device
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the table of `epoch`."""
        draws = generator(self._seed, "augment", epoch)
        shifts = torch.randint(0, 2 * PADDING + 1, (2, self._size), generator=draws)
        flips = torch.randint(0, 2, (self._size,), generator=draws, dtype=torch.bool)
        self._rows, self._columns = shifts.to(self._device)
        self._flips = flips.to(self._device)

    def __call__(self, images: Tensor, indices: Tensor) -> Tensor:
        """Augment `images`, uint8 [batch, 3, 32, 32], which are those with `indices`, int64 [batch]."""
        height, width = images.shape[2:]
        padded = F.pad(images, (PADDING,) * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # every crop there is: [batch, 3, 9, 9, 32, 32]
        each = torch.arange(len(images), device=images.device)
        cropped = windows[each, :, self._rows[indices], self._columns[indices]]
        return torch.where(self._flips[indices, None, None, None], cropped.flip(3), cropped)
