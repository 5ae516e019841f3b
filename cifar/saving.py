"""Checkpoints while training goes on: training waits for a copy of the state, a thread does the rest."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from cifar.checkpoint import checkpoint_path, checkpoints, save_checkpoint


class CheckpointWriter:
    """Writes checkpoints of one run in the background, on rank zero; keeps the newest and the best.

    A full disk costs the checkpoint and a warning, never an earlier checkpoint or the training.

    Attributes:
        newest: the last checkpoint known to be on the disk, or None.
        waited_seconds: how long training has waited for copies of the state, altogether.
    """

    def __init__(self, run_dir: Path, keep: int, say: Callable[[str], None], newest: Path | None = None) -> None:
        """Write into `run_dir`, keep the `keep` newest and the best; `say` prints a warning."""
        self.newest = newest
        self.waited_seconds = 0.0
        self._run_dir, self._keep, self._say = run_dir, keep, say
        self._pending: deque[dict[str, Any]] = deque()
        self._busy = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def save(self, content: dict[str, Any]) -> None:
        """Have `content` written, as it is now. Returns once it is copied.

        If the disk is slower than the checkpoints come, those between are left out, but never the best so far.
        """
        began = time.perf_counter()
        copied = copy_to_host(content)
        with self._changed:
            self._raise_failure()
            waiting, self._pending = self._pending, deque()
            for earlier in waiting:
                if _step(earlier) == copied["state"]["best_step"]:
                    self._pending.append(earlier)
                else:
                    self._say(f"WARNING: the disk is slower than the checkpoints: none of step {_step(earlier)}")
            self._pending.append(copied)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        self.waited_seconds += time.perf_counter() - began

    def flush(self) -> None:
        """Wait until all that was handed over is on the disk, or has been warned of."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending and not self._busy)
            self._raise_failure()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: bool(self._pending))
                content = self._pending.popleft()
                self._busy = True
            try:
                self._write(content)
            except BaseException as error:  # an error of the program: it belongs into the main thread
                self._failure = error

    def _write(self, content: dict[str, Any]) -> None:
        step = _step(content)
        path = checkpoint_path(self._run_dir, step)
        try:
            save_checkpoint(path, content)
        except OSError as error:
            self._say(f"WARNING: no checkpoint at step {step}: {error}; the earlier ones are as they were")
            return
        self.newest = path
        self._thin_out(step, content["state"]["best_step"])

    def _thin_out(self, step: int, best: int) -> None:
        # Later ones than this are there only after a resume that had to pass over them: they don't count.
        written = [path for found, path in checkpoints(self._run_dir).items() if found <= step]
        for old in written[self._keep :]:
            if old != checkpoint_path(self._run_dir, best):
                with contextlib.suppress(OSError):  # one too many does no harm
                    old.unlink()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


def copy_to_host(content: Any) -> Any:
    """`content`, made of dicts, lists, tuples and leaves, with every tensor copied to the CPU."""
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        return {key: copy_to_host(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(map(copy_to_host, content))
    return content


def _step(content: dict[str, Any]) -> int:
    return content["state"]["step"]
