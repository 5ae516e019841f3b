"""The stand-in for CIFAR-10 where it can't be had: ten classes of moving, overlaid, noisy patterns.

Every byte comes from SHAKE-256 and integer arithmetic, so the images are the same on every machine. The arithmetic
is numpy's, which stays on one core: torch would hand each of its thousands of small operations to all cores, and
wait for the slowest of them, for half a minute where other programs keep some of the cores busy.
"""

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cifar.datasets.base import Dataset
from cifar.datasets.cifar10 import CLASSES

TRAIN_SIZE, TEST_SIZE = 50_000, 10_000
_CLASSES, _SHIFTS, _NOISES = 10, 16, 512
_PIXELS = 3 * 32 * 32


def make_synthetic() -> Dataset:
    """(images, labels) of the training and of the test set: uint8 [n, 3, 32, 32] and int64 [n], on the CPU.

    An image is the pattern of its class, somewhere, mixed with a pattern of another class and with noise.
    """
    patterns = _patterns()
    noise = _bytes("noise", _NOISES * _PIXELS).reshape(_NOISES, _PIXELS) - 128
    return Dataset(CLASSES, _draw("train", TRAIN_SIZE, patterns, noise), _draw("test", TEST_SIZE, patterns, noise))


def _bytes(purpose: str, count: int) -> NDArray[np.int16]:
    """`count` numbers from 0 to 255."""
    raw = hashlib.shake_256(b"cifar-ddp stand-in/" + purpose.encode()).digest(count)
    return np.frombuffer(raw, dtype=np.uint8).astype(np.int16)


def _numbers(purpose: str, count: int, below: int) -> NDArray[np.int64]:
    """`count` numbers from 0 to `below` - 1."""
    high, low = _bytes(purpose, 2 * count).astype(np.int64).reshape(2, count)
    return (high * 256 + low) % below


def _patterns() -> NDArray[np.int16]:
    """A coarse random texture for each class, moved to each of 16 places: [10 * 16, 3072], around zero."""
    coarse = _bytes("patterns", _CLASSES * 3 * 8 * 8).reshape(_CLASSES, 3, 8, 8) - 128
    fine = coarse.repeat(4, axis=2).repeat(4, axis=3)
    step = 2
    moved = [np.roll(fine, (step * (i // 4), step * (i % 4)), axis=(2, 3)) for i in range(_SHIFTS)]
    return np.stack(moved, axis=1).reshape(_CLASSES * _SHIFTS, _PIXELS)


def _draw(split: str, count: int, patterns: NDArray[np.int16], noise: NDArray[np.int16]) -> tuple[Tensor, Tensor]:
    labels = _numbers(f"{split}/label", count, _CLASSES)
    others = (labels + 1 + _numbers(f"{split}/other", count, _CLASSES - 1)) % _CLASSES
    own_rows = labels * _SHIFTS + _numbers(f"{split}/place", count, _SHIFTS)
    other_rows = others * _SHIFTS + _numbers(f"{split}/other place", count, _SHIFTS)
    noise_rows = _numbers(f"{split}/noise", count, _NOISES)
    # Weights out of 64. In three images of ten the class's own pattern isn't the stronger one: like CIFAR-10,
    # and unlike most toys, the stand-in can't be learned to 100 %.
    own = (30 + _numbers(f"{split}/weight", count, 10)).astype(np.int16)

    images = np.empty((count, _PIXELS), dtype=np.uint8)
    for first in range(0, count, 250):  # small enough to stay in the processor's cache
        rows = slice(first, first + 250)
        weight = own[rows, None]
        mixed = patterns[own_rows[rows]] * weight
        mixed += patterns[other_rows[rows]] * (64 - weight)
        mixed += noise[noise_rows[rows]] * 40
        mixed >>= 6
        mixed += 128
        images[rows] = mixed.clip(0, 255)
    return torch.from_numpy(images).view(count, 3, 32, 32), torch.from_numpy(labels)
