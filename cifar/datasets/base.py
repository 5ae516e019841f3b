"""The form of a dataset in memory."""

from dataclasses import dataclass

from torch import Tensor

Split = tuple[Tensor, Tensor]
"""Images, uint8 [n, 3, 32, 32], and their labels, int64 [n], both on the CPU."""


@dataclass(frozen=True)
class Dataset:
    """A training and a test set, and the class names.

    Attributes:
        classes: name of each class, in the order of the labels.
        train, test: images, uint8 [n, 3, 32, 32], and labels, int64 [n] in [0, len(classes)), on the CPU.
    """

    classes: tuple[str, ...]
    train: Split
    test: Split
