"""The pictures of a data directory, decoded: kept in one file, which follows their changes."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from filelock import FileLock, Timeout

from cifar.datasets.decoding import Problem, decode
from cifar.errors import UserError
from cifar.files import remove_temporaries, write_atomically

# What the pixels of a file depend on. Each has its own files, so that two that share a folder do not take turns at it.
DECODER = f"Pillow {PIL.__version__}"


class File(NamedTuple):
    """A picture file: its path below the data directory, with "/", and what tells whether it has changed."""

    path: str
    size: int  # bytes
    mtime_ns: int


@dataclass(frozen=True)
class Pictures:
    """Picture files and their pixels.

    Attributes:
        files: all of them, sorted by path.
        problems: of the files that cannot be read, by path.
        pixels: of the others, in their order: uint8 [readable, 3, 32, 32].
    """

    files: list[File]
    problems: dict[str, Problem]
    pixels: np.ndarray

    def readable(self) -> list[File]:
        """Return the files that `pixels` holds."""
        return [file for file in self.files if file.path not in self.problems]


def load_pictures(data_dir: Path, files: list[File]) -> Pictures:
    """Load what `prepare_pictures` has decoded on this host.

    Args:
        files: the picture files of `data_dir`, sorted by path.

    Raises:
        UserError: they have changed since then.
    """
    kept = _find(_places(data_dir), files)
    if kept is None or kept.files != files:
        raise UserError(f"the pictures in {data_dir} have changed while they were read: start again")
    return kept


def prepare_pictures(data_dir: Path, files: list[File]) -> Pictures:
    """Decode the picture files that are new or have changed, on all cores, and keep the pixels for this host.

    Launches that share a place take turns. If nothing has changed, nothing is written.

    Args:
        files: the picture files of `data_dir`, sorted by path.

    Raises:
        UserError: no place can be written, or a process that decodes was killed.
    """
    places = _places(data_dir)
    kept = _find(places, files)
    if kept is not None and _is_current(kept, files):
        return kept
    with _turn(places):
        kept = _find(places, files, warn=True)
        if kept is not None and _is_current(kept, files):  # another launch has decoded them
            return kept
        made = _update(kept, data_dir, files)
        if kept is None or (kept.files, kept.problems) != (made.files, made.problems):
            _write(made, places)
    return made


def _is_current(kept: Pictures, files: list[File]) -> bool:
    return kept.files == files and not any(problem.passing for problem in kept.problems.values())


def _update(kept: Pictures | None, data_dir: Path, files: list[File]) -> Pictures:
    """Return the pictures `files`; those that `kept` has are not decoded again."""
    rows, damaged = {}, {}
    if kept is not None:
        rows = {file: row for row, file in enumerate(kept.readable())}
        damaged = {file: kept.problems[file.path] for file in kept.files if file.path in kept.problems}
    pixels = np.empty((len(files), 3, 32, 32), np.uint8)
    problems: dict[str, Problem] = {}
    left: list[int] = []
    for i, file in enumerate(files):
        if kept is not None and file in rows:
            pixels[i] = kept.pixels[rows[file]]
        elif file in damaged and not damaged[file].passing:
            problems[file.path] = damaged[file]
        else:
            left.append(i)
    if left:
        which = f"{len(left):,} new or changed of {len(files):,}" if kept is not None else f"{len(files):,}"
        print(f"decoding {which} pictures in {data_dir}", flush=True)
    results = decode([data_dir / files[i].path for i in left])
    for i, result in zip(left, results, strict=True):
        if isinstance(result, Problem):
            problems[files[i].path] = result
        else:
            pixels[i] = result
    if problems:
        pixels = pixels[[file.path not in problems for file in files]]
    return Pictures(files, problems, pixels)


# Where the pixels are kept


def _places(data_dir: Path) -> list[Path]:
    """Return the files that may hold the pixels, best first: beside the pictures, in the user's cache, until a reboot.

    torch names the user's cache, which TORCH_HOME and XDG_CACHE_HOME move.
    """
    folder = data_dir.resolve()
    decoder = DECODER.lower().replace(" ", "-")
    name = f"{folder.name}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}-{decoder}"
    places = [folder / f".cifar-ddp-pictures-{decoder}", Path(torch.hub.get_dir()).parent / "cifar-ddp" / name]
    with contextlib.suppress(OSError):  # there is no temporary directory
        temporary = Path(tempfile.gettempdir()) / f"cifar-ddp-{os.getuid()}"
        # Everybody may write to /tmp: a directory of this name may be somebody else's.
        if not os.path.lexists(temporary) or temporary.lstat().st_uid == os.getuid():
            places.append(temporary / name)
    return places


@contextlib.contextmanager
def _turn(places: Sequence[Path]) -> Iterator[None]:
    """Hold the lock of the first place that can be written."""
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(place.with_name(f"{place.name}.lock"))
            try:
                acquired = lock.acquire(timeout=0)
            except Timeout:
                print(f"waiting for another process that decodes the pictures for {place}", flush=True)
                acquired = lock.acquire()
        except (OSError, NotImplementedError):  # read-only; or a file system without locks
            continue
        with acquired:
            remove_temporaries(place)
            yield
        return
    raise _no_place(places, "they are read-only")


def _no_place(places: Sequence[Path], reason: object) -> UserError:
    names = ", ".join(str(place.parent) for place in places)
    return UserError(f"the decoded pictures cannot be written to any of {names} ({reason}): set XDG_CACHE_HOME")


# The file: the SHA-256 of the rest in hexadecimal, a line; what it holds as JSON, a line; the pixels.


def _write(pictures: Pictures, places: Sequence[Path]) -> None:
    content = {"files": pictures.files, "problems": pictures.problems}
    header = json.dumps(content).encode() + b"\n"
    pixels = pictures.pixels.reshape(-1).data
    reason: OSError | None = None
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, lambda file: file.writelines([_digest(header, pixels), header, pixels]))
        except OSError as error:
            reason = error
        else:
            if place in places[2:]:
                others = " nor ".join(str(other.parent) for other in places[:2])
                print(f"WARNING: the pictures are decoded again after a reboot: neither {others} can be written")
            return
    raise _no_place(places, reason)


def _read(place: Path) -> Pictures | None:
    """Return what the file holds; None if there is none. A ValueError says that it is damaged."""
    try:
        with place.open("rb") as file:
            digest, header = file.readline(), file.readline()
            pixels = np.fromfile(file, np.uint8)
    except OSError:
        return None
    if digest != _digest(header, pixels.data):
        raise ValueError("its SHA-256 is wrong")
    content: dict[str, Any] = json.loads(header)
    files = [File(*file) for file in content["files"]]
    problems = {path: Problem(*problem) for path, problem in content["problems"].items()}
    return Pictures(files, problems, pixels.reshape(-1, 3, 32, 32))


def _digest(header: bytes, pixels: memoryview) -> bytes:
    digest = hashlib.sha256(header)
    digest.update(pixels)
    return digest.hexdigest().encode() + b"\n"


def _find(places: Sequence[Path], files: list[File], warn: bool = False) -> Pictures | None:
    """Return what the first place with exactly these files holds; without one, the first that holds any."""
    found = None
    for place in places:
        try:
            pictures = _read(place)
        except (ValueError, KeyError, TypeError) as error:
            if warn:
                print(f"WARNING: {place} is damaged ({error}): its pictures are decoded again", flush=True)
            continue
        if pictures is not None and pictures.files == files:
            return pictures
        found = found or pictures
    return found
