"""The pictures of a data directory: decoded once, and kept in one file until one of them changes."""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
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

Files = dict[str, tuple[int, int]]
"""The path of each picture file below the data directory, with "/"; its size and when it was modified, in ns."""


class Pictures(NamedTuple):
    """The pixels of picture files, and for those that cannot be read, by path, a reason that follows the name."""

    pixels: np.ndarray  # uint8 [files, 3, 32, 32]
    problems: dict[str, str]


def prepare_pictures(data_dir: Path, files: Files) -> Pictures:
    """Decode the picture files of `data_dir` if any is new or has changed, and keep the pixels for this host.

    Launches that share a place take turns. If nothing has changed, nothing is written. A UserError says that no place
    can be written, or that a process that decodes was killed.
    """
    if (pictures := find_pictures(data_dir, files)) is not None:
        return pictures
    places = _places(data_dir)
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with lock(place.with_name(f"{place.name}.lock"), f"decodes the pictures for {place}"):
                remove_temporaries(place)
                if pictures is None:  # another launch may have decoded them meanwhile
                    pictures = find_pictures(data_dir, files) or _decode(data_dir, files)
                _write(place, files, pictures)
                return pictures
        except (OSError, NotImplementedError) as error:  # read-only, full, or a file system without locks
            reason = error
    raise UserError(f"the decoded pictures cannot be written to {places[0]} or {places[1]} ({reason})")


def find_pictures(data_dir: Path, files: Files) -> Pictures | None:
    """Return what `prepare_pictures` has kept of exactly these files, unless one with a problem can be read now."""
    digest = _digest(files)
    for place in _places(data_dir):
        try:
            with np.load(place) as arrays:
                kept_digest, problems = json.loads(arrays["content"].tobytes())
                pixels = arrays["pixels"] if kept_digest == digest else np.empty(0)
        except Exception:  # there is none, or it is damaged: zipfile and numpy raise anything
            continue
        # A CRC-32 is verified when the last byte is read, unless the shape is damaged.
        is_whole = pixels.shape == (len(files), 3, 32, 32)
        if is_whole and all(isinstance(_read(data_dir / path), str) for path in problems):
            return Pictures(pixels, problems)
    return None


def _places(data_dir: Path) -> list[Path]:
    """Return the files that may hold the pixels: beside the pictures, or in the user's cache, which torch names."""
    folder, decoder = data_dir.resolve(), DECODER.lower().replace(" ", "-")
    name = f"{folder.name}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}-{decoder}.npz"
    return [folder / f".cifar-ddp-pictures-{decoder}.npz", Path(torch.hub.get_dir()).parent / "cifar-ddp" / name]


def _write(place: Path, files: Files, pictures: Pictures) -> None:
    content = np.frombuffer(json.dumps([_digest(files), pictures.problems]).encode(), np.uint8)
    write_atomically(place, lambda file: np.savez(file, content=content, pixels=pictures.pixels))


def _digest(files: Files) -> str:
    return hashlib.sha256(json.dumps(list(files.items())).encode()).hexdigest()


def _decode(data_dir: Path, files: Files) -> Pictures:
    """Decode all files in processes, as Pillow decodes small pictures mostly in Python.

    The processes start as is the platform's default: on Linux by fork, in milliseconds. They use neither torch's
    threads nor the GPU, which do not survive a fork.
    """
    print(f"decoding {len(files):,} pictures in {data_dir}", flush=True)
    pictures = Pictures(np.zeros((len(files), 3, 32, 32), np.uint8), {})
    workers = max(1, min(available_cores(), len(files) // 50))  # another worker costs as much as 50 files
    pool = ProcessPoolExecutor(workers, initializer=_start_worker)
    try:
        results = pool.map(_read, [data_dir / path for path in files], chunksize=16)
        progress = tqdm(results, total=len(files), unit=" pictures", disable=None)  # None: not in a log
        for row, (path, result) in enumerate(zip(files, progress, strict=True)):
            if isinstance(result, str):
                pictures.problems[path] = result
            else:
                pictures.pixels[row] = result
    except BrokenProcessPool as error:
        raise UserError("a process that decodes pictures was killed, maybe for lack of memory") from error
    finally:
        pool.shutdown(cancel_futures=True)
    return pictures


def _read(path: Path) -> np.ndarray | str:
    """Return the pixels of a file, uint8 [3, 32, 32], or why it cannot be read."""
    try:
        return read_image(path).numpy()
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
