"""Checkpoints: written whole or not at all, verified before they are read, never executed."""

import contextlib
import hashlib
import io
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar.errors import UserError
from cifar.files import write_atomically

# A checkpoint is what torch.save writes, a ZIP file, with the SHA-256 of everything before it as the archive
# comment: one file that `torch.load(path, weights_only=True)` opens as it is and in which any flipped bit shows.
_MARK = b"cifar-ddp checkpoint 1, sha256 "
_COMMENT = len(_MARK) + 64


class DamagedCheckpointError(Exception):
    """The file isn't a whole checkpoint of this program."""


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write `content`, made of tensors, numbers, strings and containers of them, to `path`.

    Raises:
        OSError: the disk is full or not writable; nothing that was there has changed.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    # The last two bytes of a ZIP file without a comment are the comment's length.
    body = buffer.getvalue()[:-2] + struct.pack("<H", _COMMENT)
    comment = _MARK + hashlib.sha256(body).hexdigest().encode()
    write_atomically(path, lambda file: (file.write(body), file.write(comment)))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, with its tensors on the CPU.

    The checksum is compared first, and nothing in the file can run: unpickling is limited to plain data.

    Raises:
        DamagedCheckpointError: says what is wrong with the file.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DamagedCheckpointError(f"{path} can't be read: {error.strerror}") from error
    body, comment = raw[:-_COMMENT], raw[-_COMMENT:]
    if not comment.startswith(_MARK):
        raise DamagedCheckpointError(f"{path} is not a checkpoint of this program, or it is incomplete")
    if comment[len(_MARK) :] != hashlib.sha256(body).hexdigest().encode():
        raise DamagedCheckpointError(f"{path} is damaged: its content doesn't match its checksum")
    try:
        content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # a forged file can make the unpickler raise anything
        raise DamagedCheckpointError(
            f"{path} holds what no checkpoint of this program holds, and was not run"
        ) from error
    parts = (content.get("config"), content.get("state")) if isinstance(content, dict) else (None,)
    if not all(isinstance(part, dict) for part in parts) or "dataset" not in content:
        raise DamagedCheckpointError(f"{path} is not a checkpoint of this program")
    return content


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` belongs."""
    return run_dir / "checkpoints" / f"step-{step:08d}.pt"


def checkpoints(run_dir: Path) -> dict[int, Path]:
    """The run's checkpoint files, whole or not, by their step, newest first."""
    found = {path.stem[len("step-") :]: path for path in (run_dir / "checkpoints").glob("step-*.pt")}
    return {int(step): found[step] for step in sorted(filter(str.isdigit, found), key=int, reverse=True)}


def newest_checkpoint(run_dir: Path) -> tuple[tuple[Path, dict[str, Any]] | None, list[str]]:
    """The newest checkpoint of a run that verifies, its path and its content, and what was wrong with newer ones.

    None for a run that ended before it wrote any.

    Raises:
        UserError: there are some, and all are damaged.
    """
    complaints: list[str] = []
    for path in checkpoints(run_dir).values():
        try:
            return (path, load_checkpoint(path)), complaints
        except DamagedCheckpointError as error:
            complaints.append(str(error))
    if complaints:
        raise UserError(f"--resume {run_dir}: no good checkpoint is there; {'; '.join(complaints)}")
    return None, complaints


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of the checkpoint that the user named.

    Raises:
        UserError: it can't be used.
    """
    try:
        return load_checkpoint(path)
    except DamagedCheckpointError as error:
        raise UserError(str(error)) from error


def load_model(net: torch.nn.Module, content: dict[str, Any], model: str, path: Path) -> None:
    """Load the weights of the checkpoint `content`, read from `path`, into `net`, which is a `model`.

    Raises:
        UserError: they are another net's.
    """
    saved = content["config"].get("model")
    if saved != model:
        raise UserError(f"{path} holds a {saved!r}, not a {model!r}: add --model {saved}")
    try:
        net.load_state_dict(content["state"]["model"])
    except (RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise UserError(f"{path} doesn't fit the net {model!r}: {reason}") from error


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
        self._apply_retention(step, content["state"]["best_step"])

    def _apply_retention(self, step: int, best: int) -> None:
        # PendingAllReduce ones than this are there only after a resume that had to pass over them: they don't count.
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
