"""Registry of datasets. To add one, add a file here and a line to `DATASETS`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from cifar.datasets.base import Dataset
from cifar.datasets.cifar10 import CIFAR10, CIFAR100, load_cifar10, load_cifar100
from cifar.datasets.download import prepare
from cifar.datasets.folder import load_folder, prepare_folder
from cifar.datasets.synthetic import make_synthetic

# For each --dataset, the function that loads it from --data-dir. `Dataset.check` lists what it has to return.
DATASETS: dict[str, Callable[[Path], Dataset]] = {
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "folder": load_folder,
    "synthetic": lambda _: make_synthetic(),
}

# What one process of each host does first, while the others wait: (data_dir, data_url).
PREPARE: dict[str, Callable[[Path, str | None], None]] = {
    "cifar10": partial(prepare, CIFAR10),
    "cifar100": partial(prepare, CIFAR100),
    "folder": prepare_folder,
}
