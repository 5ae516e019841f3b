"""Write files atomically, and read JSON files that may be damaged."""

import contextlib
import errno
import glob
import json
import os
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)  # the error numbers of a file system without locks


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a temporary file, flush it to disk and rename it to `path`.

    After an interruption at any point, `path` is unchanged or complete.

    Raises:
        OSError: the disk is full or not writable; `path` is unchanged.
    """
    # Random, as processes of two containers may have the same ID.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The rename is durable once the directory is flushed, which some file systems do not support.
    with contextlib.suppress(OSError):
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def remove_temporaries(path: Path) -> None:
    """Remove what `write_atomically` has left in killed processes. No other process may be writing `path`."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 16}.tmp"):
        leftover.unlink(missing_ok=True)


def lock(path: Path, action: str) -> AbstractContextManager[object]:
    """Return a lock, the file `path`, that one process at a time holds until the end of the block.

    `action` is what its holder does, such as "downloads CIFAR-10", for the line that a wait prints. On a file system
    without locks, it does nothing.
    """
    file_lock = FileLock(path)
    try:
        return file_lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that {action}", flush=True)
        return file_lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return contextlib.nullcontext()


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically; NaN and infinity, which JSON does not have, become null."""
    finite = json.loads(json.dumps(content), parse_constant=lambda _: None)
    text = json.dumps(finite, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged.
    """
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content
