"""The run directory: create it, check that it is writable, lock it for one process."""

import contextlib
import os
import socket
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import nn

from cifar.errors import UserError
from cifar.files import NO_LOCKS, read_json, write_json

# A restarted process may find its predecessor still exiting, and a file server lets go of a host that is gone only when
# its lease ends, for NFS after 90 s.
_PATIENCE_SECONDS = 120.0
_NOTICE_SECONDS = 5.0
_RECORDS = ("config.json", "metrics.jsonl", "result.json", "index.html", "report.png", "checkpoints/step-*", "wandb")


class RunLock:
    """An exclusive lock on a run directory; the kernel releases it when the process ends, even if killed."""

    def __init__(self, run_dir: Path) -> None:
        """Acquire the lock; a UserError says who holds it, or that the directory is not writable."""
        self._run_dir, self._path = run_dir, run_dir / ".lock"
        self._is_new = not self._path.exists()
        self._lock = FileLock(self._path)
        try:
            with contextlib.suppress(Timeout):
                self._lock.acquire(_NOTICE_SECONDS)
                return
            holder = _read_launch(run_dir)
            locked = f"{run_dir} is locked by process {holder.get('pid', '?')} on {holder.get('host', '?')}"
            print(f"{locked}: waiting for it, for {_PATIENCE_SECONDS:g} s", file=sys.stderr, flush=True)
            self._lock.acquire(_PATIENCE_SECONDS - _NOTICE_SECONDS)
        except Timeout:
            raise UserError(f"{locked}: wait for it, or stop it first") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise UserError(f"the run directory {run_dir} cannot be locked: {error}; name another") from error
            advice = "see to it that no other process trains there"
            print(f"WARNING: {run_dir} cannot be locked ({error}): {advice}", file=sys.stderr, flush=True)

    def owned_by(self, launchers: list[str]) -> bool:
        """Return whether one of these launches has owned this run."""
        return not set(launchers).isdisjoint(owners(self._run_dir))

    def record_owner(self, launchers: list[str]) -> None:
        """Record this process and its launches by torchrun, one per host, beside the run's earlier ones."""
        launchers = list(dict.fromkeys([*owners(self._run_dir), *launchers]))
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "launchers": launchers}
        write_json(self._run_dir / "launch.json", owner)

    def release(self, undo: bool = False) -> None:
        """Release the lock; with `undo`, also remove the lock file if this process created it."""
        if undo and self._is_new:
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
    """Create and return `wanted`, or a new directory in runs/; a UserError says why it cannot be created."""
    try:
        if wanted is not None:
            wanted.mkdir(parents=True, exist_ok=True)
            return wanted
        while True:
            run_dir = Path("runs") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{recipe}"
            with contextlib.suppress(FileExistsError):  # another launch in the same second: take the next one
                run_dir.mkdir(parents=True)
                return run_dir
            time.sleep(0.1)
    except OSError as error:
        raise UserError(f"the run directory cannot be created: {error}; name another with --run-dir") from error


def check_unused(run_dir: Path) -> None:
    """Check, with the lock held, that a new run would overwrite nothing in `run_dir`; a UserError names what it would.

    Other files may be there, such as a log, and what a start leaves that was killed before it wrote its configuration.
    """
    for name in _RECORDS:
        if next(run_dir.glob(name), None) is not None:
            advice = "name a new directory, or continue it with --autoresume"
            raise UserError(f"--run-dir {run_dir} holds a run ({name}): {advice}")


def check_writable(run_dir: Path, model: nn.Module) -> None:
    """Check before training that `run_dir` has room for this run; remove what killed processes left half-written.

    A run needs room for weights, momentum and a checkpoint beside its predecessor, and 4 MiB for the records. Without
    it, there is a UserError, and a new directory is left empty, so that the same command can be repeated.
    """
    need = 3 * 8 * sum(parameter.numel() for parameter in model.parameters()) + (4 << 20)  # bytes
    checkpoints = run_dir / "checkpoints"
    try:
        checkpoints.mkdir(exist_ok=True)
        for leftover in checkpoints.glob(".*.tmp"):
            leftover.unlink()
        with tempfile.TemporaryFile(dir=run_dir) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, need)
            else:  # macOS
                file.write(bytes(need))
    except OSError as error:
        with contextlib.suppress(OSError):
            checkpoints.rmdir()  # fails unless it is empty
        raise UserError(
            f"the run directory {run_dir} does not take the {need / 1e6:.1f} MB of this run: {error}; "
            f"free space, or name another with --run-dir"
        ) from error
