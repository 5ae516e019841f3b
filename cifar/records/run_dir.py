"""The run directory: create it, check that it is writable, lock it for one process."""

import contextlib
import os
import socket
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import nn

from cifar.errors import UserError
from cifar.files import read_json, write_json

# A restarted process may find its predecessor still exiting, and a file server lets go of a host that is gone only when
# its lease ends, for NFS after 90 s.
_PATIENCE_SECONDS = 120.0
_NOTICE_SECONDS = 5.0


class RunLock:
    """An exclusive lock on a run directory; the kernel releases it when the process ends, even if killed."""

    def __init__(self, run_dir: Path) -> None:
        """Acquire the lock.

        Raises:
            UserError: another process holds it, or the directory is not writable.
        """
        self._run_dir, self._path = run_dir, run_dir / ".lock"
        self._new = not self._path.exists()
        self._lock = FileLock(self._path)
        try:
            try:
                self._lock.acquire(_NOTICE_SECONDS)
            except Timeout:
                holder = _read_launch(run_dir)
                locked = f"{run_dir} is locked by process {holder.get('pid', '?')} on {holder.get('host', '?')}"
                print(f"{locked}: waiting for it, for {_PATIENCE_SECONDS:g} s", file=sys.stderr, flush=True)
                self._lock.acquire(_PATIENCE_SECONDS - _NOTICE_SECONDS)
        except Timeout:
            raise UserError(f"{locked}: wait for it, or stop it first") from None
        except (OSError, NotImplementedError) as error:
            raise UserError(f"the run directory {run_dir} cannot be locked: {error}; name another") from error

    def owned_by(self, launchers: list[str]) -> bool:
        """Return whether one of these launches has owned this run."""
        return not set(launchers).isdisjoint(owners(self._run_dir))

    def record_owner(self, launchers: list[str]) -> None:
        """Record this process and its launches by torchrun, one per host, beside the run's earlier ones.

        Raises:
            UserError: the disk is full.
        """
        launchers = list(dict.fromkeys([*owners(self._run_dir), *launchers]))
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "launchers": launchers}
        try:
            write_json(self._run_dir / "launch.json", owner)
        except OSError as error:
            raise UserError(f"launch.json cannot be written to {self._run_dir}: {error}") from error

    def release(self, undo: bool = False) -> None:
        """Release the lock; with `undo`, also remove the lock file if this process created it."""
        if undo and self._new:
            self._path.unlink(missing_ok=True)  # before the release, after which another process may hold it
        self._lock.release()


def owners(run_dir: Path) -> list[str]:
    """Return the launches by torchrun that have owned the run, one per host."""
    launchers = _read_launch(run_dir).get("launchers")
    return launchers if isinstance(launchers, list) else []


def _read_launch(run_dir: Path) -> dict[str, Any]:
    try:
        return read_json(run_dir / "launch.json")
    except (OSError, ValueError):
        return {}


def create_run_dir(wanted: Path | None, recipe: str) -> Path:
    """Create and return a run directory: `wanted`, or one with a new name in runs/.

    Raises:
        UserError: `wanted` holds a run, or the directory cannot be created.
    """
    try:
        if wanted is not None:
            wanted.mkdir(parents=True, exist_ok=True)
            return wanted
        stem = f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{recipe}"
        for suffix in ("", *(f"-{n}" for n in range(2, 100))):
            run_dir = Path("runs") / (stem + suffix)
            run_dir.parent.mkdir(exist_ok=True)
            with contextlib.suppress(FileExistsError):  # another launch in the same second
                run_dir.mkdir()
                return run_dir
        raise UserError(f"runs/{stem}-* are all taken: name a directory with --run-dir")
    except OSError as error:
        raise UserError(f"the run directory cannot be created: {error}; name another with --run-dir") from error


def check_unused(run_dir: Path) -> None:
    """Check that a new run would overwrite nothing in `run_dir`, which may hold other files: a log, for one.

    What a start leaves that was killed before its configuration was written does not count. To be called with the
    lock held.

    Raises:
        UserError: there is a run, or a part of one.
    """
    if (run_dir / "config.json").exists():
        raise UserError(
            f"--run-dir {run_dir} holds a run: name a new directory, or continue it with --resume {run_dir}"
        )
    for name in _RECORDS:
        if next(run_dir.glob(name), None) is not None:
            raise UserError(f"--run-dir {run_dir} already holds {name}, but no config.json: name a new directory")


_RECORDS = ("metrics.jsonl", "result.json", "index.html", "report.png", "checkpoints/step-*", "wandb")


def check_writable(run_dir: Path, model: nn.Module) -> None:
    """Check before training that `run_dir` has room for this run; remove what killed processes left half-written.

    That is for weights, momentum and a checkpoint beside its predecessor, and 4 MiB for the records.

    Raises:
        UserError: it has not; a directory that was empty is empty again, so that the same command can be repeated.
    """
    need = 3 * 8 * sum(parameter.numel() for parameter in model.parameters()) + (4 << 20)  # bytes
    checkpoints, probe = run_dir / "checkpoints", run_dir / ".space-probe"
    try:
        checkpoints.mkdir(exist_ok=True)
        for leftover in checkpoints.glob(".*.tmp"):
            leftover.unlink()
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
            checkpoints.rmdir()  # fails unless it is empty
        raise UserError(
            f"the run directory {run_dir} does not take the {need / 1e6:.1f} MB of this run: {error}; "
            f"free space, or name another with --run-dir"
        ) from error
