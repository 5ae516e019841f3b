"""CIFAR-100 (Krizhevsky 2009): the hundred fine classes, 500 training and 100 test images of each."""

from pathlib import Path

from cifar.datasets.base import Dataset
from cifar.datasets.cifar10 import read
from cifar.datasets.download import Archive, prepare

ARCHIVE = Archive(
    title="CIFAR-100",
    name="cifar-100-python.tar.gz",
    folder="cifar-100-python",
    size=169_001_437,
    sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    urls=("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",),
)


def prepare_cifar100(data_dir: Path, data_url: str | None) -> None:
    """Ensure that `data_dir/cifar-100-python` exists; see `download.prepare`."""
    prepare(ARCHIVE, data_dir, data_url)


def load_cifar100(data_dir: Path) -> Dataset:
    """Load CIFAR-100 from `data_dir/cifar-100-python`: 50,000 training and 10,000 test images.

    Raises:
        UserError: a file is missing, corrupt or unreadable.
    """
    return read("CIFAR100", ARCHIVE, data_dir)
