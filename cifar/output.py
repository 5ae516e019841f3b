"""Output that cannot be written does not end the program: a closed pipe, a full disk, a terminal that is gone."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


@contextlib.contextmanager
def safe_output() -> Iterator[None]:
    """Run a block in which writing to stdout or stderr never raises: what nobody can read is dropped."""
    _occupy_standard_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = streams = tuple(_SafeStream(stream) for stream in before)
    try:
        yield
    finally:
        for stream in streams:
            stream.finish()
        sys.stdout, sys.stderr = before


class _SafeStream:
    """A text stream whose write errors are ignored."""

    def __init__(self, stream: TextIO | None) -> None:  # None if the descriptor was closed before Python started
        self._stream: TextIO = stream or open(os.devnull, "w")  # noqa: SIM115
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a class name that the terminal's encoding lacks

    def write(self, text: str) -> int:
        """Write `text`, or drop it."""
        with self._ignore_errors():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or drop what is in the buffer."""
        with self._ignore_errors():
            self._stream.flush()

    def finish(self) -> None:
        """Flush for the last time, so that Python's own flush at exit cannot fail."""
        with self._ignore_errors(last=True):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _ignore_errors(self, last: bool = False) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            # A full disk may have room again later; a reader that is gone does not come back.
            if last or getattr(error, "errno", None) != errno.ENOSPC:
                with contextlib.suppress(OSError, ValueError):
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nowhere, self._stream.fileno())
                    os.close(nowhere)
                    self._stream.flush()


def _occupy_standard_descriptors() -> None:
    """Open the null device as each of the descriptors 0 to 2 that is closed: a checkpoint must not become stdout."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
