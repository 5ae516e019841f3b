"""The pictures of a data directory: decoded once, and kept in one file until one of them changes."""

import functools
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from tqdm import tqdm

from cifar.distributed.cpu import available_cores
from cifar.errors import UserError
from cifar.files import lock, remove_temporaries, write_atomically
from cifar.pictures import read_image

# What pixels depend on besides the files. Each version has its own file, so that two can share a folder.
DECODER = f"Pillow {PIL.__version__}"


class PictureFile(NamedTuple):
    """A picture file as it was decoded."""

    size: int  # bytes
    modified: int  # ns
    is_test: bool  # whether it is of the test split


Files = dict[str, PictureFile]
"""Picture files by their path below the data directory, with "/"."""


class Pictures(NamedTuple):
    """The pixels of picture files, and for those that cannot be read, by path, a reason that follows the name."""

    pixels: np.ndarray  # uint8 [readable files, size, size, 3], in the order of the files
    problems: dict[str, str]


def prepare_pictures(data_dir: Path, files: Files, image_size: int) -> Pictures:
    """Decode the picture files of `data_dir` if any is new or has changed, and keep the pixels for this host.

    Launches that share a place take turns. If nothing has changed, nothing is written. A UserError says that no place
    can be written, or that a process that decodes was killed.
    """
    if (pictures := find_pictures(data_dir, files, image_size)) is not None:
        return pictures
    places = _places(data_dir, image_size)
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with lock(place.with_name(f"{place.name}.lock"), f"decodes the pictures for {place}"):
                remove_temporaries(place)
                if pictures is None:  # another launch may have decoded them meanwhile
                    pictures = find_pictures(data_dir, files, image_size) or _decode(data_dir, files, image_size)
                _write(place, files, pictures)
                return pictures
        except (OSError, NotImplementedError) as error:  # read-only, full, or a file system without locks
            reason = error
    raise UserError(f"the decoded pictures cannot be written to {places[0]} or {places[1]} ({reason})")


def find_pictures(data_dir: Path, files: Files, image_size: int) -> Pictures | None:
    """Return what `prepare_pictures` has kept of exactly these files, unless one with a problem can be read now.

    The pixels are those of the file, mapped into memory: the processes of a host share its pages.
    """
    for place in _places(data_dir, image_size):
        try:
            with place.open("rb") as file:
                checksum, content = int(file.readline()), file.readline()
                digest, problems = json.loads(content)
                shape = (len(files) - len(problems), image_size, image_size, 3)
                pixels = np.memmap(file, np.uint8, "c", file.tell(), shape)  # "c": a change is this process's alone
        except (OSError, ValueError, TypeError):  # there is none, or it is damaged
            continue
        is_whole = digest == _digest(files) and checksum == zlib.crc32(pixels.data, zlib.crc32(content))
        if is_whole and all(isinstance(_read(data_dir / path, image_size), str) for path in problems):
            return Pictures(pixels, problems)
    return None


def _places(data_dir: Path, image_size: int) -> list[Path]:
    """Return the files that may hold the pixels: beside the pictures, or in the user's cache, which torch names."""
    folder, kind = data_dir.resolve(), f"{image_size}-{DECODER.lower().replace(' ', '-')}"
    name = f"{folder.name}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}-{kind}.bin"
    return [folder / f".cifar-ddp-pictures-{kind}.bin", Path(torch.hub.get_dir()).parent / "cifar-ddp" / name]


def _write(place: Path, files: Files, pictures: Pictures) -> None:
    """Write a CRC-32 of the rest as a line, a digest of the files and the problems as a line, and the pixels."""
    content = json.dumps([_digest(files), pictures.problems]).encode() + b"\n"
    checksum = zlib.crc32(pictures.pixels.data, zlib.crc32(content))
    parts = (b"%d\n" % checksum, content, pictures.pixels.data)
    write_atomically(place, lambda file: file.writelines(parts))


def _digest(files: Files) -> str:
    return hashlib.sha256(json.dumps(list(files.items())).encode()).hexdigest()


def _decode(data_dir: Path, files: Files, image_size: int) -> Pictures:
    """Decode all files in processes, as Pillow decodes small pictures mostly in Python.

    The processes start as is the platform's default: on Linux by fork, in milliseconds. They use neither torch's
    threads nor the GPU, which do not survive a fork.
    """
    print(f"decoding {len(files):,} pictures in {data_dir} to {image_size} x {image_size}", flush=True)
    pixels, problems = np.empty((len(files), image_size, image_size, 3), np.uint8), {}
    workers = max(1, min(available_cores(), len(files) // 50))  # another worker costs as much as 50 files
    pool = ProcessPoolExecutor(workers, initializer=_start_worker)
    try:
        read = functools.partial(_read, image_size=image_size)
        results = pool.map(read, [data_dir / path for path in files], chunksize=16)
        progress = tqdm(results, total=len(files), unit=" pictures", disable=None)  # None: not in a log
        for number, (path, result) in enumerate(zip(files, progress, strict=True)):
            if isinstance(result, str):
                problems[path] = result
            else:
                pixels[number - len(problems)] = result
    except BrokenProcessPool as error:
        raise UserError("a process that decodes pictures was killed, maybe for lack of memory") from error
    finally:
        pool.shutdown(cancel_futures=True)
    return Pictures(pixels[: len(files) - len(problems)], problems)


def _read(path: Path, image_size: int) -> np.ndarray | str:
    """Return the pixels of a file, uint8 [size, size, 3], or why it cannot be read."""
    try:
        return read_image(path, image_size).permute(1, 2, 0).numpy()
    except UserError as error:
        return str(error).removeprefix(f"{path} ")


def _start_worker() -> None:
    """Let signals end this process without a traceback; let it end with its parent, whose lock it has inherited."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as it is in the background of a script
            signal.signal(number, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(1)
