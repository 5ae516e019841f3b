"""A pseudo-terminal: start a command on it, read what it shows, and type."""

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tests.helpers.processes import clean_environment

# Make it the controlling terminal, and restore Ctrl-C, which a process in the background ignores.
_ON_TERMINAL = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.login_tty(sys.stdin.fileno())
os.execvp(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """A command on a terminal; a context manager that kills it at the end."""

    def __init__(self, command: Sequence[object], cwd: Path, **environment: str) -> None:
        self._written = b""
        self._screen, keyboard = pty.openpty()
        termios.tcsetwinsize(keyboard, (40, 120))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _ON_TERMINAL, *map(str, command)],
            cwd=cwd, env=clean_environment(TERM="xterm-256color", **environment),
            stdin=keyboard, stdout=keyboard, stderr=keyboard,
        )  # fmt: skip
        os.close(keyboard)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # with what it has started
        self._process.wait()
        os.close(self._screen)

    @property
    def written(self) -> str:
        """Return all that the command has written so far, with control sequences."""
        return self._written.decode(errors="replace")

    def until(self, text: str, timeout: float = 60) -> None:
        """Wait until `text` has been written."""
        end = time.monotonic() + timeout
        while text not in self.written:
            assert time.monotonic() < end, f"no {text!r} within {timeout} s: {self.written[-2000:]}"
            assert self._read(), f"it exited without {text!r}: {self.written[-2000:]}"

    def type(self, keys: str) -> None:
        """Press these keys."""
        os.write(self._screen, keys.encode())

    def hang_up(self, timeout: float = 120) -> int:
        """Close the terminal, wait until the command exits, and return its status."""
        with open(os.devnull) as nowhere:
            os.dup2(nowhere.fileno(), self._screen)
        return self._process.wait(timeout)

    def end(self, timeout: float = 120) -> int:
        """Wait until the command exits, and return its status."""
        end = time.monotonic() + timeout
        while self._read():
            assert time.monotonic() < end, f"still running after {timeout} s: {self.written[-2000:]}"
        return self._process.wait(timeout)

    def _read(self) -> bool:
        """Read what has been written; return False at the end."""
        if not select.select([self._screen], [], [], 0.1)[0]:
            return True
        try:
            chunk = os.read(self._screen, 1 << 16)
        except OSError:  # on Linux, once the other side is closed
            return False
        self._written += chunk
        return chunk != b""
