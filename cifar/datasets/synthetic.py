"""The synthetic dataset, for use without CIFAR-10: ten classes of shifted, overlaid, noisy patterns.

Every byte comes from SHAKE-256 and integer arithmetic, so the images are the same on every machine. NumPy uses one
core: torch would split thousands of small operations among all cores, and take half a minute on a busy machine.
"""

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray

from cifar.datasets.base import Dataset, Split
from cifar.datasets.cifar10 import CLASSES

TRAIN_SIZE, TEST_SIZE = 50_000, 10_000
_SHIFTS, _NOISES = 16, 512
_PIXELS = 3 * 32 * 32


def make_synthetic() -> Dataset:
    """Return 50,000 training and 10,000 test images: the pattern of a class, mixed with another's and with noise."""
    patterns = _patterns()
    noise = _bytes("noise", _NOISES * _PIXELS).reshape(_NOISES, _PIXELS) - 128
    return Dataset(CLASSES, _draw("train", TRAIN_SIZE, patterns, noise), _draw("test", TEST_SIZE, patterns, noise))


def _bytes(purpose: str, count: int) -> NDArray[np.int16]:
    """Return `count` numbers from 0 to 255, determined by `purpose`."""
    # The prefix is the seed of every image, not the dataset's name.
    raw = hashlib.shake_256(b"cifar-ddp stand-in/" + purpose.encode()).digest(count)
    return np.frombuffer(raw, dtype=np.uint8).astype(np.int16)


def _numbers(purpose: str, count: int, below: int) -> NDArray[np.int64]:
    """Return `count` numbers from 0 to `below` - 1, determined by `purpose`."""
    high, low = _bytes(purpose, 2 * count).astype(np.int64).reshape(2, count)
    return (high * 256 + low) % below


def _patterns() -> NDArray[np.int16]:
    """Return a coarse random texture for each class at each of 16 shifts: [10 * 16, 3072], centered at zero."""
    coarse = _bytes("patterns", len(CLASSES) * 3 * 8 * 8).reshape(-1, 3, 8, 8) - 128
    fine = coarse.repeat(4, axis=2).repeat(4, axis=3)
    shifted = [np.roll(fine, (2 * (i // 4), 2 * (i % 4)), axis=(2, 3)) for i in range(_SHIFTS)]
    return np.stack(shifted, axis=1).reshape(-1, _PIXELS)


def _draw(split: str, count: int, patterns: NDArray[np.int16], noise: NDArray[np.int16]) -> Split:
    """Return `count` images, uint8 [count, 3, 32, 32], and labels, int64 [count]."""
    labels = _numbers(f"{split}/label", count, len(CLASSES))
    others = (labels + 1 + _numbers(f"{split}/other", count, len(CLASSES) - 1)) % len(CLASSES)
    rows = labels * _SHIFTS + _numbers(f"{split}/place", count, _SHIFTS)
    other_rows = others * _SHIFTS + _numbers(f"{split}/other place", count, _SHIFTS)
    noise_rows = _numbers(f"{split}/noise", count, _NOISES)
    # Out of 64. In three of ten images the class's pattern is the weaker one: no model reaches 100 %, as on CIFAR-10.
    weights = (30 + _numbers(f"{split}/weight", count, 10)).astype(np.int16)

    images = np.empty((count, _PIXELS), dtype=np.uint8)
    for first in range(0, count, 250):  # small enough to stay in the CPU cache
        batch = slice(first, first + 250)
        weight = weights[batch, None]
        mixed = patterns[rows[batch]] * weight
        mixed += patterns[other_rows[batch]] * (64 - weight)
        mixed += noise[noise_rows[batch]] * 40
        mixed >>= 6
        mixed += 128
        images[batch] = mixed.clip(0, 255)
    return torch.from_numpy(images).view(count, 3, 32, 32), torch.from_numpy(labels)
