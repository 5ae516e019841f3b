"""Registry of datasets. To add one, add a file here and a line to `DATASETS`."""

from collections.abc import Callable

from cifar.config import TrainConfig
from cifar.datasets import cifar10
from cifar.datasets.base import Dataset
from cifar.datasets.download import prepare
from cifar.datasets.folder import IMAGE_SIZE, load_folder, prepare_folder
from cifar.datasets.synthetic import make_synthetic

# For each --dataset, the function that loads it. `Dataset.check` lists what it has to return.
DATASETS: dict[str, Callable[[TrainConfig], Dataset]] = {
    "cifar10": lambda config: cifar10.load_cifar10(config.data_dir),
    "cifar100": lambda config: cifar10.load_cifar100(config.data_dir),
    "folder": lambda config: load_folder(config.data_dir, config.image_size or IMAGE_SIZE),
    "synthetic": lambda _: make_synthetic(),
}

# What one process of each host does first, while the others wait.
PREPARE: dict[str, Callable[[TrainConfig], None]] = {
    "cifar10": lambda config: prepare(cifar10.CIFAR10, config.data_dir, config.data_url),
    "cifar100": lambda config: prepare(cifar10.CIFAR100, config.data_dir, config.data_url),
    "folder": lambda config: prepare_folder(config.data_dir, config.image_size or IMAGE_SIZE),
}
