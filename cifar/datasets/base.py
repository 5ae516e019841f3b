"""A dataset in memory, and the check of its form."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cifar.errors import UserError

Split = tuple[Tensor, Tensor]
"""Images, uint8 [n, 3, size, size], and their labels, int64 [n], both on the CPU."""


@dataclass(frozen=True)
class Dataset:
    """A training and a test set, and the class names."""

    classes: tuple[str, ...]  # the name of each class, in the order of the labels
    train: Split
    test: Split
    note: str = ""  # what the banner says besides
    decoder: str = ""  # the library that has decoded the images, with its version, if another may give other pixels

    @property
    def image_size(self) -> int:
        """Return the side of an image in pixels."""
        return self.train[0].shape[-2]

    def check(self, name: str) -> None:
        """Check types, shapes, labels and class names, not the pixels; a UserError says what is wrong with `name`."""
        if not self.classes or not all(self.classes) or len(set(self.classes)) < len(self.classes):
            raise UserError(f"dataset {name}: the class names must be non-empty and unique, not {self.classes}")
        for split, (images, labels) in (("training", self.train), ("test", self.test)):
            about = f"dataset {name}: {split}"
            form, size = f"{images.dtype} {list(images.shape)}", self.image_size
            if images.dtype != torch.uint8 or images.shape[1:] != (3, size, size) or len(images) == 0:
                square = f"torch.uint8 [n, 3, {size}, {size}]"
                raise UserError(f"{about} images must be {square}, with n > 0, not {form}")
            if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
                form = f"{labels.dtype} {list(labels.shape)}"
                raise UserError(f"{about} labels must be torch.int64 [{len(images)}], not {form}")
            low, high = labels.min().item(), labels.max().item()
            if low < 0 or high >= len(self.classes):
                last = len(self.classes) - 1
                raise UserError(f"{about} labels must be in [0, {last}], one per class name, not in [{low}, {high}]")

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Return the size of each split and a SHA-256 of its images, labels and class names, in words."""
        words = {}
        for split, (images, labels) in (("training", self.train), ("test", self.test)):
            digest = hashlib.sha256(json.dumps(self.classes).encode())
            for part in (*images.split(100), labels):  # contiguous copies of a few at once
                digest.update(part.contiguous().numpy().data)
            words[split] = f"{len(images):,} images, SHA-256 {digest.hexdigest()[:16]}"
        return words
