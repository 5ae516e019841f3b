"""Registry of datasets. To add one, add a file here and a line to `DATASETS`."""

from collections.abc import Callable
from pathlib import Path

from cifar.datasets.base import Dataset
from cifar.datasets.cifar10 import load_cifar10
from cifar.datasets.synthetic import make_synthetic

# For each --dataset, the function that loads it from --data-dir. `Dataset.check` lists what it has to return.
DATASETS: dict[str, Callable[[Path], Dataset]] = {
    "cifar10": load_cifar10,
    "synthetic": lambda _: make_synthetic(),
}
