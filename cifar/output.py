"""Output that cannot be written does not end the program: a closed pipe, a full disk, a terminal that is gone."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


@contextlib.contextmanager
def safe_output() -> Iterator[None]:
    """Run a block in which writing to this process's stdout or stderr never raises: what cannot be written is dropped.

    What replaces them in a notebook or a test is left alone.
    """
    _occupy_standard_descriptors()
    before = sys.stdout, sys.stderr
    if sys.stdout is sys.__stdout__:
        sys.stdout = _safe_stream(1, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _safe_stream(2, sys.stderr)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


class _SafeFile(io.FileIO):
    """A file that drops what it cannot write."""

    def write(self, data: Any, /) -> int:
        """Return the number of bytes that were written or dropped."""
        with contextlib.suppress(OSError):
            return super().write(data) or len(data)  # None if a non-blocking pipe is full
        return len(data)


def _safe_stream(descriptor: int, stream: TextIO | None) -> TextIO:
    """Return a stream to a descriptor, in the encoding of `stream`; that is None if the descriptor was closed."""
    file = io.BufferedWriter(_SafeFile(descriptor, "w", closefd=False))
    return io.TextIOWrapper(file, stream.encoding if stream else None, "backslashreplace", line_buffering=True)


def _occupy_standard_descriptors() -> None:
    """Open the null device as each of the descriptors 0 to 2 that is closed: a checkpoint must not become stdout."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
