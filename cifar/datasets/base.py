"""A dataset in memory, and the check of its form."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from cifar.errors import UserError

Split = tuple[Tensor, Tensor]
"""Images, uint8 [n, 3, 32, 32], and their labels, int64 [n], both on the CPU."""


@dataclass(frozen=True)
class Dataset:
    """A training and a test set, and the class names.

    Attributes:
        classes: name of each class, in the order of the labels.
        train, test: images, uint8 [n, 3, 32, 32], and labels, int64 [n] in [0, len(classes)), on the CPU.
        note: what the banner says besides, or nothing.
        decoder: the library that has decoded the images, with its version, if another may give other pixels.
    """

    classes: tuple[str, ...]
    train: Split
    test: Split
    note: str = ""
    decoder: str = ""

    def check(self, name: str) -> None:
        """Check types, shapes, labels and class names. Reads the labels, not the pixels.

        Args:
            name: of the dataset, for the message.

        Raises:
            UserError: the first thing that does not fit.
        """
        if not self.classes or not all(self.classes) or len(set(self.classes)) < len(self.classes):
            raise UserError(f"dataset {name}: the class names must be non-empty and unique, not {self.classes}")
        for split, (images, labels) in (("training", self.train), ("test", self.test)):
            if not _form(images).startswith("uint8 [") or images.shape[1:] != (3, 32, 32):
                raise UserError(f"dataset {name}: {split} images must be uint8 [n, 3, 32, 32], not {_form(images)}")
            if _form(labels) != f"int64 [{len(images)}]":
                raise UserError(f"dataset {name}: {split} labels must be int64 [{len(images)}], not {_form(labels)}")
            if len(images) == 0:
                raise UserError(f"dataset {name}: there must be at least one {split} image")
            low, high = labels.min().item(), labels.max().item()
            if low < 0 or high >= len(self.classes):
                raise UserError(
                    f"dataset {name}: {split} labels must be in [0, {len(self.classes) - 1}], one for each class name, "
                    f"not in [{low}, {high}]"
                )

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Return the size of each split and a SHA-256 of its images, labels and class names, in words."""
        words = {}
        for split, (images, labels) in (("training", self.train), ("test", self.test)):
            digest = hashlib.sha256(json.dumps(self.classes).encode())
            for tensor in (images, labels):
                digest.update(tensor.contiguous().numpy().data)
            words[split] = f"{len(images):,} images, SHA-256 {digest.hexdigest()[:16]}"
        return words


def _form(value: object) -> str:
    """Return a tensor's dtype and shape, such as "uint8 [10000, 3, 32, 32]"; of any other value, its type."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
