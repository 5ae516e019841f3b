"""Who writes a run: one launch at a time, which finds its own run again after a restart."""

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cifar.config import TrainConfig, read_config
from cifar.errors import UserError
from cifar.run import write_json
from cifar.runtime import Runtime

# A restart may begin while the process that it replaces is still on its way out.
_PATIENCE_SECONDS = 5.0


class Claim:
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

    def is_of(self, launchers: list[str]) -> bool:
        """Whether one of `launchers` was the last to sign here."""
        return not set(launchers).isdisjoint(_launchers(self._note.parent))

    def sign(self, launchers: list[str]) -> None:
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


def continue_own_run(config: TrainConfig, runtime: Runtime) -> TrainConfig:
    """The configuration to go on with: that of the run which this launch has begun before, else `config`.

    torchrun starts the same command line again when a rank has failed or a host has come or gone; it is one and the
    same run then. The launch is known by torchrun's own process, which stays. (TORCHELASTIC_RUN_ID is no help: it is
    "none" in every launch that doesn't set it; nor is the restart count, which a host that returns begins at zero.)
    """
    agent = runtime.launch.agent()
    own = None
    if agent is not None and runtime.local_rank == 0:
        named = config.resume or config.run_dir
        candidates = [named] if named is not None else Path("runs").glob("*")
        began = float(agent.rsplit(":", 1)[1])
        for run_dir in candidates:
            with contextlib.suppress(OSError):
                # A folder that hasn't changed since torchrun began can't be this launch's.
                if run_dir.stat().st_mtime >= began - 1 and agent in _launchers(run_dir):
                    own = run_dir
    run_dirs = [found for found in runtime.gather(own) if found is not None]
    if not run_dirs:
        return config
    return read_config(run_dirs[0])


def _launchers(run_dir: Path) -> list[str]:
    return _read(run_dir / "launch.json").get("launchers", [])


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
