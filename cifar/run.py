"""A run is a folder: made before training, proven writable, never another run's."""

import contextlib
import json
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from cifar.errors import UserError


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Have `write` fill a temporary file, flush it to the disk and rename it to `path`.

    Whatever interrupts it, `path` is afterwards either what it was or complete.

    Raises:
        OSError: the disk is full or not writable; `path` is what it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The rename itself lasts once the folder is on the disk. Not every file system can do that; `path` is new anyhow.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def create_run(wanted: Path | None, recipe: str) -> Path:
    """A new, empty run folder: `wanted`, or a fresh name under runs/.

    Raises:
        UserError: `wanted` isn't empty, or the folder can't be made.
    """
    try:
        if wanted is not None:
            wanted.mkdir(parents=True, exist_ok=True)
            if any(wanted.iterdir()):
                raise UserError(
                    f"--run-dir {wanted} is not empty: name a new folder, or continue that run with --resume {wanted}"
                )
            return wanted
        stem = f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{recipe}"
        for suffix in ("", *(f"-{n}" for n in range(2, 100))):
            fresh = Path("runs") / (stem + suffix)
            fresh.parent.mkdir(exist_ok=True)
            try:
                fresh.mkdir()
            except FileExistsError:
                continue  # another launch in the same second
            return fresh
        raise UserError(f"runs/{stem}-* are all taken: name a folder with --run-dir")
    except OSError as error:
        raise UserError(f"the run folder can't be made: {error}; name another with --run-dir") from error


def check_writable(run_dir: Path, need: int) -> None:
    """Prove now, not after an epoch, that `need` bytes can be written into `run_dir`.

    Files that a killed process left half-written are removed.

    Raises:
        UserError: they can't; a folder that was empty is empty again, so that the same command can be repeated.
    """
    checkpoints = run_dir / "checkpoints"
    try:
        checkpoints.mkdir(exist_ok=True)
        for leftover in checkpoints.glob(".*.tmp"):
            leftover.unlink()
        probe = run_dir / ".space-probe"
        try:
            with probe.open("wb") as file:
                for _ in range(0, need, 1 << 20):
                    file.write(bytes(1 << 20))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        with contextlib.suppress(OSError):
            checkpoints.rmdir()  # only if it is empty
        raise UserError(
            f"the run folder {run_dir} does not take the {need / 1e6:.1f} MB of this run's records: {error}; "
            f"free space or name another with --run-dir"
        ) from error
