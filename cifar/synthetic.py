"""The stand-in for CIFAR-10 where it can't be had: ten classes of moving, overlaid, noisy patterns.

Every byte comes from SHAKE-256 and integer arithmetic, so the images are the same on every machine.
"""

import hashlib

import torch
from torch import Tensor

TRAIN_SIZE, TEST_SIZE = 50_000, 10_000
_CLASSES, _SHIFTS, _NOISES = 10, 16, 512
_PIXELS = 3 * 32 * 32


def make_synthetic() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels) of the training and of the test set: uint8 [n, 3, 32, 32] and int64 [n], on the CPU.

    An image is the pattern of its class, somewhere, mixed with a pattern of another class and with noise.
    """
    patterns = _patterns()
    noise = _bytes("noise", _NOISES * _PIXELS).view(_NOISES, _PIXELS) - 128
    return _draw("train", TRAIN_SIZE, patterns, noise), _draw("test", TEST_SIZE, patterns, noise)


def _bytes(purpose: str, count: int) -> Tensor:
    """`count` numbers from 0 to 255, int16."""
    raw = hashlib.shake_256(b"cifar-ddp stand-in/" + purpose.encode()).digest(count)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).short()


def _numbers(purpose: str, count: int, below: int) -> Tensor:
    """`count` numbers from 0 to `below` - 1, int64."""
    raw = _bytes(purpose, 2 * count).long().view(2, count)
    return (raw[0] * 256 + raw[1]) % below


def _patterns() -> Tensor:
    """A coarse random texture for each class, moved to each of 16 places: int16 [10 * 16, 3072], around zero."""
    coarse = _bytes("patterns", _CLASSES * 3 * 8 * 8).view(_CLASSES, 3, 8, 8) - 128
    fine = coarse.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    step = 2
    moved = [fine.roll((step * (i // 4), step * (i % 4)), dims=(2, 3)) for i in range(_SHIFTS)]
    return torch.stack(moved, dim=1).reshape(_CLASSES * _SHIFTS, _PIXELS)


def _draw(split: str, count: int, patterns: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    labels = _numbers(f"{split}/label", count, _CLASSES)
    others = (labels + 1 + _numbers(f"{split}/other", count, _CLASSES - 1)) % _CLASSES
    own_rows = labels * _SHIFTS + _numbers(f"{split}/place", count, _SHIFTS)
    other_rows = others * _SHIFTS + _numbers(f"{split}/other place", count, _SHIFTS)
    noise_rows = _numbers(f"{split}/noise", count, _NOISES)
    # Weights out of 64. In three images of ten the class's own pattern isn't the stronger one: like CIFAR-10,
    # and unlike most toys, the stand-in can't be learned to 100 %.
    own = 30 + _numbers(f"{split}/weight", count, 10)

    images = torch.empty(count, _PIXELS, dtype=torch.uint8)
    for rows in torch.arange(count).split(250):  # small enough to stay in the processor's cache
        weight = own[rows, None].short()
        mixed = patterns[own_rows[rows]] * weight
        mixed += patterns[other_rows[rows]] * (64 - weight)
        mixed += noise[noise_rows[rows]] * 40
        mixed >>= 6
        mixed += 128
        images[rows[0] : rows[-1] + 1] = mixed.clamp_(0, 255)
    return images.view(count, 3, 32, 32), labels
