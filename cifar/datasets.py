"""The datasets by name. A new one is a file here and a line in `DATASETS`."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from cifar.cifar10 import load_cifar10
from cifar.synthetic import make_synthetic

Split = tuple[Tensor, Tensor]

CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# From the data folder, the training and the test set: images, uint8 [n, 3, 32, 32], and labels, int64 [n].
DATASETS: dict[str, Callable[[Path], tuple[Split, Split]]] = {
    "cifar10": load_cifar10,
    "synthetic": lambda _: make_synthetic(),
}
