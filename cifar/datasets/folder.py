"""A folder of pictures: DIR/train/CLASS/ and DIR/test/CLASS/, the convention of torchvision's ImageFolder."""

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path

import torch

from cifar.datasets.base import Dataset, Split
from cifar.datasets.picture_cache import DECODER, File, load_pictures, prepare_pictures
from cifar.errors import UserError
from cifar.pictures import FORMATS, picture_formats

MAX_CLASSES = 1000
_HELD_OUT = 10  # without test/, one in so many pictures of a class
_NAMED = 20  # unreadable pictures that are named at a start


def prepare_folder(data_dir: Path, data_url: str | None = None) -> None:
    """Decode the pictures of `data_dir` that are new or have changed; name those that cannot be read.

    Args:
        data_url: not used; a folder has no archive.

    Raises:
        UserError: the folder does not have this form, or the decoded pictures cannot be written anywhere.
    """
    files, ignored = list_files(data_dir)
    problems = prepare_pictures(data_dir, files).problems
    if ignored:
        number = "1 file" if ignored == 1 else f"{ignored:,} files"
        print(f"{number} in {data_dir} ignored: no supported format of pictures has such a suffix", flush=True)
    if _too_many(problems, files):  # load_folder says so
        return
    for path in sorted(problems)[:_NAMED]:
        print(f"WARNING: left out: {data_dir / path} {problems[path].reason}", flush=True)
    if len(problems) > _NAMED:
        print(f"WARNING: left out: {len(problems) - _NAMED:,} more", flush=True)


def _too_many(problems: Sized, files: Sized) -> bool:
    return 100 * len(problems) > len(files)


def load_folder(data_dir: Path) -> Dataset:
    """Load the pictures that `prepare_folder` has decoded on this host.

    Images are in the order of a hash of their paths, so that the first of them are a random sample of all classes.

    Raises:
        UserError: the folder does not have this form, a class has no readable picture for a split, or more than 1 % of
            the pictures are unreadable.
    """
    files, _ = list_files(data_dir)
    pictures = load_pictures(data_dir, files)
    readable, problems = pictures.readable(), pictures.problems
    if _too_many(problems, files):
        reasons = [f"{data_dir / path} {problems[path].reason}" for path in sorted(problems)]
        raise UserError(
            f"{len(problems):,} of the {len(files):,} pictures in {data_dir} cannot be read, more than 1 %: remove or "
            f"replace them: {_first(reasons, '; ')}"
        )
    rows: dict[tuple[str, str], list[int]] = defaultdict(list)  # by split and class
    for row, file in enumerate(readable):
        split, name, _ = file.path.split("/", 2)
        rows[split, name].append(row)
    classes = sorted({file.path.split("/", 2)[1] for file in files})
    notes = [f"{len(problems):,} unreadable left out"] if problems else []
    if not any(file.path.startswith("test/") for file in files):
        notes.insert(0, "test: a tenth of train/, by a hash of each picture's name, at least one of each class")
        for name in classes:
            # Each name decides for itself, so that a new picture moves no other one to the other split.
            hashed = sorted((_hash(readable[row].path.split("/", 2)[2]), row) for row in rows["train", name])
            few = sum(number * _HELD_OUT < 1 << 64 for number, _ in hashed)
            few = max(1, min(few, len(hashed) - 1))  # but no class is left without training or test pictures
            rows["test", name], rows["train", name] = (
                [row for _, row in part] for part in (hashed[:few], hashed[few:])
            )
            if len(hashed) == 1:
                raise UserError(
                    f"class {name} has one picture that can be read, and one is held out for the test: add pictures, "
                    f"or make {data_dir / 'test'}"
                )

    pixels = torch.from_numpy(pictures.pixels).flatten(1)  # whole images are copied faster

    def take(split: str) -> Split:
        labels = {row: label for label, name in enumerate(classes) for row in rows[split, name]}
        for name in classes:
            if not rows[split, name]:
                raise UserError(f"none of the pictures in {data_dir / split / name} can be read: replace them")
        order = sorted(labels, key=lambda row: _hash(readable[row].path))
        images = pixels.index_select(0, torch.tensor(order)).view(-1, 3, 32, 32)
        return images, torch.tensor([labels[row] for row in order])

    return Dataset(tuple(classes), take("train"), take("test"), "; ".join(notes), DECODER)


def _hash(text: str) -> int:
    """Return 64 bits that are the same on every machine."""
    return int.from_bytes(hashlib.sha256(os.fsencode(text)).digest()[:8])


def list_files(data_dir: Path) -> tuple[list[File], int]:
    """Return the picture files of `data_dir`, sorted by path, and the number of other files.

    A picture is a file with a suffix of `pictures.FORMATS`, at any depth below its class. Hidden files and directories
    do not count; symbolic links are followed.

    Raises:
        UserError: there is no train/, the classes are fewer than 2, more than 1,000 or not the same in test/, or a
            class has no picture.
    """
    train, test = data_dir / "train", data_dir / "test"
    suffixes = {suffix for name in picture_formats() for suffix in FORMATS[name].split()}
    files: list[File] = []
    ignored = 0
    try:
        if not train.is_dir():
            raise UserError(f"there is no {train}: --dataset folder reads the pictures in {train / 'CLASS'}")
        splits = [train, test] if test.is_dir() else [train]
        _check_classes(data_dir, *map(_class_names, splits))
        for split in splits:
            for name in _class_names(split):
                before = len(files)
                for path, status in _walk(split / name):
                    kind = stat.S_IFMT(status.st_mode)
                    # A broken link counts, and cannot be read.
                    if os.path.splitext(path)[1].lower() in suffixes and kind in (stat.S_IFREG, stat.S_IFLNK):
                        files.append(File(f"{split.name}/{name}/{path}", status.st_size, status.st_mtime_ns))
                    else:
                        ignored += 1
                if len(files) == before:
                    raise UserError(f"there is no picture in {split / name}: add some, or remove the class everywhere")
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    return sorted(files), ignored


def _class_names(split: Path) -> list[str]:
    return sorted(entry.name for entry in split.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _check_classes(data_dir: Path, train: list[str], test: list[str] | None = None) -> None:
    """Check the names of the classes; `test` is None without test/."""
    names = {"train": train, "test": test or []}
    if not 2 <= len(train) <= MAX_CLASSES:
        found = "one class only, " + train[0] if len(train) == 1 else f"{len(train):,} classes"
        raise UserError(
            f"{data_dir / 'train'} has {found}: it must hold 2 to {MAX_CLASSES:,} directories of pictures, one for each"
        )
    if unprintable := [name for name in train if not name.isprintable()]:
        raise UserError(f"{data_dir / 'train'}: rename the class {unprintable[0]!r}: its name cannot be printed")
    for here, there in (("train", "test"), ("test", "train")):
        if test is not None and (alone := sorted(set(names[here]) - set(names[there]))):
            raise UserError(
                f"in {data_dir / here} but not in {data_dir / there}: {_first(alone)} (a class needs pictures in both)"
            )


def _walk(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the path below `folder` of each file that is not hidden, and its status; of a broken link, the link's own.

    Args:
        above: device and inode of the directories that contain `folder`: a link to one of them is not followed.
    """
    own = os.stat(folder)
    above |= {(own.st_dev, own.st_ino)}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                status = entry.stat()
            except OSError:
                status = entry.stat(follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode):
                yield entry.name, status
            elif (status.st_dev, status.st_ino) not in above:
                for path, inner in _walk(Path(entry.path), above):
                    yield f"{entry.name}/{path}", inner


def _first(texts: Sequence[str], separator: str = ", ") -> str:
    return separator.join([*texts[:3], *(["..."] if len(texts) > 3 else [])])
