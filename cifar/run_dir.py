"""The run directory: created, proven writable, locked by one process."""

import contextlib
import json
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cifar.errors import UserError
from cifar.files import write_json

# A restart may begin while the process that it replaces is still on its way out.
_PATIENCE_SECONDS = 5.0


class RunLock:
    """This process's right to write into a run's folder: a lock that the system frees when it ends, in any way."""

    def __init__(self, run_dir: Path) -> None:
        """Take it.

        Raises:
            UserError: another process has it, or the folder isn't writable.
        """
        self._path = run_dir / ".lock"
        self._note = run_dir / "launch.json"
        self._new = not self._path.exists()
        self._lock = FileLock(self._path, timeout=_PATIENCE_SECONDS)
        try:
            self._lock.acquire()
        except Timeout:
            writer = _read(self._note)
            raise UserError(
                f"{run_dir} is being written by another process right now (process {writer.get('pid', '?')} on "
                f"{writer.get('host', '?')}): wait for it, or stop it first"
            ) from None
        except (OSError, NotImplementedError) as error:
            raise UserError(f"the run folder {run_dir} can't be locked: {error}; name another") from error

    def owned_by(self, launchers: list[str]) -> bool:
        """Whether one of `launchers` was the last to sign here."""
        return not set(launchers).isdisjoint(owners(self._note.parent))

    def record_owner(self, launchers: list[str]) -> None:
        """Note who writes, and which launchers' runs these are, beside the lock.

        Raises:
            OSError: the disk is full.
        """
        write_json(self._note, {"host": socket.gethostname(), "pid": os.getpid(), "launchers": launchers})

    def release(self, undo: bool = False) -> None:
        """Give it back; with `undo`, leave no trace in a folder that was new."""
        if undo and self._new:
            self._path.unlink(missing_ok=True)  # while it is still this process's own
        self._lock.release()


def create_run_dir(wanted: Path | None, recipe: str) -> Path:
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


def owners(run_dir: Path) -> list[str]:
    return _read(run_dir / "launch.json").get("launchers", [])


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
