"""A folder of pictures: DIR/train/CLASS/ and DIR/test/CLASS/, the convention of torchvision's ImageFolder."""

import hashlib
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

from cifar.datasets.base import Dataset
from cifar.datasets.picture_cache import DECODER, Files, PictureFile, find_pictures, prepare_pictures
from cifar.errors import UserError
from cifar.pictures import SUFFIXES

IMAGE_SIZE = 32  # of --image-size, as CIFAR's images have it
_TEST_SPLITS = ("test", "val", "valid", "validation")  # the last three as of ImageNet, Roboflow, timm
_LAST_TEST_HASH = 2**64 // 10  # without a test split, a tenth of the pictures have this hash or a lower one


def prepare_folder(data_dir: Path, image_size: int) -> None:
    """Decode the pictures of `data_dir` if any is new or has changed; name those that cannot be read.

    A UserError says what is wrong with the folder, that more than 1 % of the pictures are unreadable, or that the
    decoded ones cannot be written anywhere.
    """
    files = list_files(data_dir)
    problems = prepare_pictures(data_dir, files, image_size).problems
    reasons = [f"{data_dir / path} {reason}" for path, reason in sorted(problems.items())]
    if 100 * len(problems) > len(files):
        raise UserError(
            f"{len(problems):,} of the {len(files):,} pictures in {data_dir} cannot be read, more than 1 %: remove or "
            f"replace them: {'; '.join(reasons[:3])}"
        )
    for reason in reasons:
        print(f"WARNING: left out: {reason}", flush=True)


def load_folder(data_dir: Path, image_size: int) -> Dataset:
    """Load the pictures that `prepare_folder` has decoded on this host; a UserError says that they have changed since.

    Images are in the order of a hash of their paths, so that the first of them are a random sample of all classes. They
    are in memory once, whatever the number of processes.
    """
    files = list_files(data_dir)
    pictures = find_pictures(data_dir, files, image_size)
    if pictures is None:
        raise UserError(f"the pictures in {data_dir} have changed while they were read: start again")
    notes = []
    match _test_splits(data_dir):
        case []:
            notes = ["test: a tenth of train/, by a hash of each picture's name, at least one of each class"]
        case [split, *others] if split != "test" or others:
            notes = [f"test: {split}/", *(f"{other}/ is not used" for other in others)]
    if pictures.problems:
        notes.append(f"{len(pictures.problems):,} unreadable left out")
    names = {name: label for label, name in enumerate(sorted({_class_of(path) for path in files}))}
    readable = {path: file for path, file in files.items() if path not in pictures.problems}
    images = torch.from_numpy(pictures.pixels).permute(0, 3, 1, 2)
    labels = torch.tensor([names[_class_of(path)] for path in readable])
    first_test = sum(not file.is_test for file in readable.values())
    splits = [(images[rows], labels[rows]) for rows in (slice(first_test), slice(first_test, None))]
    return Dataset(tuple(names), splits[0], splits[1], "; ".join(notes), DECODER)


def _test_splits(data_dir: Path) -> list[str]:
    """Return the directories that may be the test split; the first one is."""
    return [name for name in _TEST_SPLITS if (data_dir / name).is_dir()]


def _class_of(path: str) -> str:
    return _composed(path.split("/", 2)[1])


def _composed(name: str) -> str:
    """Return the composed form (NFC): macOS and Linux may write the same name in different characters."""
    return unicodedata.normalize("NFC", name)


def _hold_out(paths: list[str]) -> set[str]:
    """Return the pictures that are for the test where no split is: about a tenth of each class, neither none nor all.

    Each name decides for itself, so that a new picture moves no other one to the other split.
    """
    hashes: dict[str, list[tuple[int, str]]] = defaultdict(list)  # of names, and their paths, by class
    for path in paths:
        hashes[_class_of(path)].append((_hash(path.split("/", 2)[2]), path))
    held_out: set[str] = set()
    for members in hashes.values():
        number = sum(value <= _LAST_TEST_HASH for value, _ in members)
        number = min(max(1, number), len(members) - 1)
        held_out.update(path for _, path in sorted(members)[:number])
    return held_out


def _hash(text: str) -> int:
    """Return 64 bits that are the same on every machine."""
    return int.from_bytes(hashlib.sha256(os.fsencode(text)).digest()[:8])


def list_files(data_dir: Path) -> Files:
    """Return the picture files of `data_dir`, the training split first; a UserError says what is wrong with the folder.

    A picture is a file with a suffix of `pictures.FORMATS`, at any depth below its class. Hidden files and directories
    do not count. Symbolic links are followed, but not those into a split or around it, whose pictures count there.
    """
    splits = ["train", *_test_splits(data_dir)[:1]]
    files: dict[str, tuple[int, int]] = {}
    try:
        train = data_dir / "train"
        if not train.is_dir():
            raise UserError(f"there is no {train}: --dataset folder reads the pictures in {train / 'CLASS'}")
        roots = [(data_dir / split).resolve() for split in splits]
        directories = {split: _class_directories(data_dir / split, roots) for split in splits}
        classes = [{_composed(name) for name in names} for names in directories.values()]
        if not 2 <= len(classes[0]) <= 1000:
            raise UserError(f"{train} must hold 2 to 1,000 directories, one for each class, not {len(classes[0]):,}")
        if single := sorted(classes[0] ^ classes[-1]):
            raise UserError(f"only one of {' and '.join(splits)} in {data_dir} has the class {single[0]!r}: both must")
        for folder in [f"{split}/{name}" for split in splits for name in directories[split]]:
            pictures = dict(_walk(data_dir, folder, roots))
            if not pictures:
                others = [path.suffix or "no suffix" for path in (data_dir / folder).rglob("*") if path.is_file()]
                kinds = ", ".join(sorted(set(others)))
                advice = f"convert its {len(others):,} files ({kinds}), for example to .jpg" if others else "add some"
                raise UserError(f"there is no picture in {data_dir / folder}: {advice}, or remove the class")
            files |= pictures
    except OSError as error:
        raise UserError(f"cannot read {data_dir}: {error}") from error
    is_test = {path for path in files if not path.startswith("train/")} or _hold_out(list(files))
    order = sorted(files, key=lambda path: (path in is_test, _hash(path)))
    return {path: PictureFile(*files[path], path in is_test) for path in order}


def _class_directories(split: Path, splits: list[Path]) -> list[str]:
    directories = [entry for entry in split.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return sorted(entry.name for entry in directories if not (entry.is_symlink() and _leads_back(entry, splits)))


def _walk(data_dir: Path, folder: str, splits: list[Path]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the path of each picture below `data_dir / folder`, its size and when it was modified, in ns."""
    for entry in os.scandir(data_dir / folder):
        path = f"{folder}/{entry.name}"
        if entry.name.startswith(".") or (entry.is_symlink() and _leads_back(entry.path, splits)):
            continue
        if entry.is_dir():
            yield from _walk(data_dir, path, splits)
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and (entry.is_file() or entry.is_symlink()):
            status = entry.stat(follow_symlinks=entry.is_file())  # a broken link is a picture that cannot be read
            yield path, (status.st_size, status.st_mtime_ns)


def _leads_back(link: str | Path, splits: list[Path]) -> bool:
    """Return whether a symbolic link leads into one of the splits, or to a directory that holds one."""
    target = Path(os.path.realpath(link))
    return target.exists() and any(target.is_relative_to(split) or split.is_relative_to(target) for split in splits)
