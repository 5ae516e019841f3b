"""Checkpoints: written whole or not at all, verified before they are read, never executed."""

import hashlib
import io
import struct
from pathlib import Path
from typing import Any

import torch

from cifar.errors import UserError
from cifar.run import write_atomically

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


def load_net(net: torch.nn.Module, content: dict[str, Any], model: str, path: Path) -> None:
    """Load the weights of the checkpoint `content`, read from `path`, into `net`, which is a `model`.

    Raises:
        UserError: they are another net's.
    """
    saved = content["config"].get("model")
    if saved != model:
        raise UserError(f"{path} holds a {saved!r}, not a {model!r}: add --model {saved}")
    try:
        net.load_state_dict(content["state"]["net"])
    except (RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise UserError(f"{path} doesn't fit the net {model!r}: {reason}") from error
