"""Decode many picture files, in processes on all cores."""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cifar.distributed.cpu import available_cores
from cifar.errors import UserError, first_line
from cifar.pictures import read_image

_BATCH = 50  # pictures that a worker sends at once
_PER_WORKER = 50  # pictures below which a worker costs more than it saves


class Problem(NamedTuple):
    """Why a file cannot be read as a picture.

    Attributes:
        reason: one line, to follow the name of the file.
        passing: whether the file itself may be good: it could not be opened, or there was no memory for it.
    """

    reason: str
    passing: bool


def decode(paths: list[Path]) -> Iterator[np.ndarray | Problem]:
    """Yield the pixels of each file, uint8 [3, 32, 32], or why there are none; print the progress.

    Pillow decodes small pictures in Python for the most part, so threads would take turns.

    Raises:
        UserError: a process that decodes was killed.
    """
    workers = min(available_cores(), len(paths) // _PER_WORKER)
    loader: DataLoader[list[np.ndarray | Problem]] = DataLoader(
        _Pictures(paths),  # type: ignore[arg-type]
        batch_size=_BATCH,
        num_workers=workers if workers > 1 else 0,
        # Arrays, unlike tensors, come through a pipe: the shared memory of a container may be small.
        collate_fn=list,
        worker_init_fn=_end_with_parent,
        generator=torch.Generator(),  # else it would advance the global one
    )
    draw = sys.stderr.isatty()
    with tqdm(total=len(paths), unit=" pictures", desc="decoding", disable=not draw) as bar:
        done, spoken = 0, time.monotonic()
        try:
            for batch in loader:
                yield from batch
                bar.update(len(batch))
                tenth, done = 10 * done // len(paths), done + len(batch)
                if not draw and 10 * done // len(paths) > tenth and time.monotonic() - spoken > 1:
                    spoken = time.monotonic()
                    print(f"  {10 * done // len(paths)}0 % of {len(paths):,} pictures", flush=True)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            reason = f"a process that decodes pictures was killed, maybe for lack of memory: {first_line(error)}"
            raise UserError(reason) from error


def _end_with_parent(_: int) -> None:
    """End this worker when the process that started it is gone, be it killed.

    torch's workers do not if the pipe is full, and would hold the lock that they have inherited.
    """

    def wait() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class _Pictures(Dataset[np.ndarray | Problem]):
    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> np.ndarray | Problem:
        path = self._paths[index]
        try:
            return read_image(path).numpy()
        except UserError as error:
            reason = str(error).removeprefix(f"{path} ")
            cause = error.__cause__  # for a damaged picture, Pillow raises an OSError without errno
            return Problem(reason, isinstance(cause, MemoryError) or getattr(cause, "errno", None) is not None)
