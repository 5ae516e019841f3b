"""A folder of pictures: DIR/train/CLASS/ and DIR/test/CLASS/, the convention of torchvision's ImageFolder."""

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from cifar.datasets.base import Dataset, Split
from cifar.datasets.picture_cache import DECODER, Files, find_pictures, prepare_pictures
from cifar.errors import UserError
from cifar.pictures import SUFFIXES

_MAX_CLASSES = 1000
_HELD_OUT = 10  # without test/, one in so many pictures of a class
_NAMED = 20  # unreadable pictures that are named at a start


def prepare_folder(data_dir: Path, data_url: str | None = None) -> None:
    """Decode the pictures of `data_dir` if any is new or has changed; name those that cannot be read.

    Args:
        data_url: not used; a folder has no archive.

    Raises:
        UserError: the folder does not have this form, more than 1 % of the pictures are unreadable, or the decoded
            ones cannot be written anywhere.
    """
    files, ignored = list_files(data_dir)
    problems = prepare_pictures(data_dir, files).problems
    if ignored:
        number = "1 file" if ignored == 1 else f"{ignored:,} files"
        print(f"{number} in {data_dir} ignored: no supported format of pictures has such a suffix", flush=True)
    if 100 * len(problems) > len(files):
        reasons = [f"{data_dir / path} {reason}" for path, reason in problems.items()]
        raise UserError(
            f"{len(problems):,} of the {len(files):,} pictures in {data_dir} cannot be read, more than 1 %: remove or "
            f"replace them: {_first(reasons, '; ')}"
        )
    for path, reason in list(problems.items())[:_NAMED]:
        print(f"WARNING: left out: {data_dir / path} {reason}", flush=True)
    if len(problems) > _NAMED:
        print(f"WARNING: left out: {len(problems) - _NAMED:,} more", flush=True)


def load_folder(data_dir: Path) -> Dataset:
    """Load the pictures that `prepare_folder` has decoded on this host.

    Images are in the order of a hash of their paths, so that the first of them are a random sample of all classes.

    Raises:
        UserError: the folder has changed meanwhile, or a class has no readable picture for a split.
    """
    files, _ = list_files(data_dir)
    pictures = find_pictures(data_dir, files)
    if pictures is None:
        raise UserError(f"the pictures in {data_dir} have changed while they were read: start again")
    problems = pictures.problems
    notes = [f"{len(problems):,} unreadable left out"] if problems else []
    paths = sorted(files.keys() - problems.keys(), key=_hash)
    test = {path for path in paths if path.startswith("test/")}
    if not any(path.startswith("test/") for path in files):
        test = _hold_out(paths)
        notes.insert(0, "test: a tenth of train/, by a hash of each picture's name, at least one of each class")
    rows = {path: row for row, path in enumerate(files)}
    labels = {name: label for label, name in enumerate(sorted(set(map(_class_of, files))))}
    pixels = torch.from_numpy(pictures.pixels).flatten(1)  # whole images are copied faster
    members_of = {"training": [path for path in paths if path not in test], "test": [p for p in paths if p in test]}
    splits: list[Split] = []
    for split, members in members_of.items():
        if missing := sorted(labels.keys() - set(map(_class_of, members))):
            raise UserError(f"there is no readable picture for {split} of class {_first(missing)}: add pictures")
        images = pixels.index_select(0, torch.tensor([rows[path] for path in members]))
        splits.append((images.view(-1, 3, 32, 32), torch.tensor([labels[_class_of(path)] for path in members])))
    return Dataset(tuple(labels), splits[0], splits[1], "; ".join(notes), DECODER)


def _class_of(path: str) -> str:
    return path.split("/", 2)[1]


def _hold_out(paths: list[str]) -> set[str]:
    """Return the pictures that are for the test, without test/: about a tenth of each class, but neither none nor all.

    Each name decides for itself, so that a new picture moves no other one to the other split.
    """
    hashes: dict[str, list[tuple[int, str]]] = defaultdict(list)  # of names, and their paths, by class
    for path in paths:
        hashes[_class_of(path)].append((_hash(path.split("/", 2)[2]), path))
    held_out: set[str] = set()
    for members in hashes.values():
        number = sum(value * _HELD_OUT < 1 << 64 for value, _ in members)
        number = max(1, min(number, len(members) - 1))
        held_out.update(path for _, path in sorted(members)[:number])
    return held_out


def _hash(text: str) -> int:
    """Return 64 bits that are the same on every machine."""
    return int.from_bytes(hashlib.sha256(os.fsencode(text)).digest()[:8])


def list_files(data_dir: Path) -> tuple[Files, int]:
    """Return the picture files of `data_dir`, sorted by path, and the number of other files.

    A picture is a file with a suffix of `pictures.FORMATS`, at any depth below its class. Hidden files and directories
    do not count; symbolic links are followed.

    Raises:
        UserError: there is no train/, the classes are fewer than 2, more than 1,000 or not the same in test/, or a
            class has no picture.
    """
    train, test = data_dir / "train", data_dir / "test"
    files: Files = {}
    ignored = 0
    try:
        if not train.is_dir():
            raise UserError(f"there is no {train}: --dataset folder reads the pictures in {train / 'CLASS'}")
        splits = {split: _class_names(split) for split in (train, test) if split.is_dir()}
        _check_classes(train, splits[train], splits.get(test))
        for folder in [split / name for split, names in splits.items() for name in names]:
            before = len(files)
            for path in _walk(folder):
                if (state := _state(path)) is None:
                    ignored += 1
                else:
                    files[path.removeprefix(str(data_dir)).lstrip("/")] = state
            if len(files) == before:
                raise UserError(f"there is no picture in {folder}: add some, or remove the class everywhere")
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    return dict(sorted(files.items())), ignored


def _class_names(split: Path) -> list[str]:
    return sorted(entry.name for entry in split.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _check_classes(folder: Path, train: list[str], test: list[str] | None) -> None:
    if not 2 <= len(train) <= _MAX_CLASSES:
        raise UserError(
            f"{folder} must hold 2 to {_MAX_CLASSES:,} directories of pictures, one for each class, not {len(train):,}"
        )
    if unprintable := [name for name in train if not name.isprintable()]:
        raise UserError(f"{folder}: rename the class {unprintable[0]!r}: its name cannot be printed")
    if test is not None and (alone := sorted(set(train) ^ set(test))):
        raise UserError(
            f"only one of {folder} and {folder.with_name('test')} has pictures of {_first(alone)}: both must"
        )


def _walk(folder: Path) -> Iterator[str]:
    """Yield the path of each file below `folder`; neither hidden ones nor those in hidden directories."""

    def fail(error: OSError) -> None:
        raise error

    for directory, names, files in os.walk(folder, onerror=fail, followlinks=True):
        names[:] = [name for name in names if not name.startswith(".") and not _is_loop(Path(directory, name))]
        yield from (f"{directory}/{name}" for name in files if not name.startswith("."))


def _is_loop(path: Path) -> bool:
    """Return whether a directory is a symbolic link to one that contains it."""
    return path.is_symlink() and any(path.samefile(parent) for parent in path.parents)


def _state(path: str) -> tuple[int, int] | None:
    """Return the size of a picture and when it was modified; None of another file. A broken link counts as one."""
    if os.path.splitext(path)[1].lower() not in SUFFIXES:
        return None
    status = os.stat(path) if os.path.exists(path) else os.lstat(path)
    is_picture = stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)
    return (status.st_size, status.st_mtime_ns) if is_picture else None


def _first(texts: Sequence[str], separator: str = ", ") -> str:
    return separator.join([*texts[:3], *(["..."] if len(texts) > 3 else [])])
