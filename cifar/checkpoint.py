"""The state of a run and its checkpoints: written atomically and in the background, verified before loading."""

import contextlib
import io
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar.distributed.ddp import HookMemory
from cifar.errors import UserError
from cifar.files import write_atomically

FORMAT = 2


class DamagedCheckpointError(UserError):
    """The file is not a valid checkpoint; the text is "PATH: REASON"."""


@dataclass
class TrainState:
    """Everything that changes during training; a checkpoint holds all of it.

    Attributes:
        model: the bare module.
        scaler: the loss scaler of fp16.
        hook: the memory of DDP's communication hook, or None.
        running_loss: this rank's losses since the last log point, summed over steps: a float32 scalar on the device.
        running_steps: optimizer steps since the last log point.
        step: optimizer steps since the run began; the plan turns it into an epoch and a position in it.
        train_seconds: seconds of training, without start-up, evaluation and checkpoints.
        first_step_seconds: those of `train_seconds` until the end of the first step, in which kernels are loaded,
            chosen and compiled; summed over the processes that have continued the run.
        best_accuracy, best_step: highest test accuracy after an epoch, 0 to 1, and the step of that test.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    hook: HookMemory | None = None
    running_loss: Tensor = field(init=False)
    running_steps: int = 0
    step: int = 0
    train_seconds: float = 0.0
    first_step_seconds: float = 0.0
    best_accuracy: float = 0.0
    best_step: int = 0

    def __post_init__(self) -> None:
        self.running_loss = torch.zeros((), device=next(self.model.parameters()).device)

    def rank_state(self, rank: int) -> dict[str, Any]:
        """Return what differs between the ranks: the running loss, BatchNorm's statistics and the hook's memory.

        Tensors are copied to the CPU. The statistics of rank zero are left out, for the model has them.
        """
        buffers = {name: buffer for name, buffer in self.model.named_buffers() if buffer.is_floating_point()}
        return {
            "running_loss": self.running_loss.item(),
            "buffers": copy_to_host(buffers) if rank else {},
            "hook": copy_to_host(self.hook.state_dict()) if self.hook is not None else {},
        }

    def state_dict(self, ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the state as tensors, numbers, strings and containers of them; `ranks` has every `rank_state`."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            **{name: getattr(self, name) for name in _NUMBERS},
            **{name: [rank_state[name] for rank_state in ranks] for name in ("running_loss", "buffers", "hook")},
        }

    def load_state_dict(self, state: dict[str, Any], rank: int, world_size: int) -> bool:
        """Restore the state of rank `rank` of `world_size` from what `state_dict` returned for any number of ranks.

        Returns:
            Whether the communication hook begins again, for lack of a memory from as many ranks.
        """
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name in _NUMBERS:
            setattr(self, name, state[name])
        losses, memory = state["running_loss"], dict[str, Any]()
        if len(losses) == world_size:
            self.running_loss.fill_(losses[rank])
            of_ranks = {name: state.get(name, [{}] * world_size) for name in ("buffers", "hook")}  # not in old files
            self.model.load_state_dict(of_ranks["buffers"][rank], strict=False)
            memory = of_ranks["hook"][rank]
        else:  # one sum per rank: with another number of ranks, their mean gives the same average
            self.running_loss.fill_(sum(losses) / len(losses))
        return self.hook is not None and self.hook.load_state_dict(memory)


_NUMBERS = ("running_steps", "step", "train_seconds", "first_step_seconds", "best_accuracy", "best_step")


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write `content`, made of tensors, numbers, strings and containers of them, to `path` atomically.

    Raises:
        OSError: the disk is full or not writable; a file that was at `path` is unchanged.
    """
    buffer = io.BytesIO()  # torch.save turns an OSError of a file into a RuntimeError
    torch.save(content, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Verify and load a checkpoint; DamagedCheckpointError tells that it is corrupt, or no checkpoint.

    Every record is compared with its CRC-32, which torch.save writes and torch.load ignores. Nothing in the file is
    executed: unpickling is limited to plain data.

    Returns:
        {"format": 2, "config": {...}, "dataset": str, "classes": [str, ...], "image_size": int (pixels), "state":
        `TrainState.state_dict()`}, the tensors on the CPU.
    """
    # torch.load gets a new archive of the verified records: from a file with a flipped bit it may read other bytes than
    # zipfile, or none (a record that is marked as a directory is left uninitialized).
    verified = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(verified, "w") as copy:
            for record in archive.infolist():
                copy.writestr(zipfile.ZipInfo(record.filename), archive.read(record))  # dated 1980, whatever the clock
    except Exception as error:  # a corrupt archive can make zipfile raise anything
        reason = getattr(error, "strerror", None) or f"corrupt, or not a checkpoint: {error}"
        raise DamagedCheckpointError(f"{path}: {reason}") from error
    try:
        verified.seek(0)
        content = torch.load(verified, map_location="cpu", weights_only=True)
    except Exception as error:  # a malicious file can make the unpickler raise anything
        raise DamagedCheckpointError(f"{path}: holds more than tensors and plain data; not executed") from error
    types = {"format": int, "config": dict, "dataset": str, "classes": list, "state": dict}
    if not isinstance(content, dict) or any(not isinstance(content.get(key), types[key]) for key in types):
        raise DamagedCheckpointError(f"{path}: not a checkpoint of this program")
    if content["format"] != FORMAT:
        raise UserError(f"{path} has checkpoint format {content['format']}: load it with a later version")
    return {"image_size": 32} | content  # earlier versions knew no other size


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return the path of the checkpoint of `step`."""
    return run_dir / "checkpoints" / f"step-{step:08d}.pt"


def checkpoints(run_dir: Path) -> dict[int, Path]:
    """Return the run's checkpoint files, valid or not, by step, newest first."""
    paths = {path.stem.removeprefix("step-"): path for path in (run_dir / "checkpoints").glob("step-*.pt")}
    return {int(step): paths[step] for step in sorted(filter(str.isdigit, paths), key=int, reverse=True)}


def checkpoint_file(path: Path) -> Path:
    """Return `path`, or if it is the directory of a run, its checkpoint with the highest test accuracy."""
    paths = checkpoints(path)
    if not paths:
        return path
    newest = next(iter(paths.values()))
    return paths.get(load_checkpoint(newest)["state"]["best_step"], newest)


def load_weights(model: nn.Module, content: dict[str, Any], name: str, path: Path) -> None:
    """Load the weights of the checkpoint `content`, read from `path`, into `model`, built as `name`."""
    saved = content["config"].get("model")
    if saved != name:
        raise UserError(f"{path} holds the model {saved!r}, not {name!r}: add --model {saved}")
    try:
        model.load_state_dict(content["state"]["model"])
    except (RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise UserError(f"{path} holds a {name!r} of another form than this version's: {reason}") from error


class CheckpointWriter:
    """Write a run's checkpoints in a background thread; keep the newest ones and the best.

    Training waits for a copy of the state and, if the disk is slower than the checkpoint interval, for the previous
    write: a disk that hangs holds up training at the next checkpoint.

    Attributes:
        newest: the newest checkpoint on disk, or None.
        waited_seconds: total time that training has waited for copies and writes.
    """

    def __init__(self, run_dir: Path, keep: int, print0: Callable[[str], None], newest: Path | None = None) -> None:
        """Write to `run_dir`; keep the `keep` newest checkpoints and the best; print warnings with `print0`."""
        self.newest = newest
        self.waited_seconds = 0.0
        self._run_dir, self._keep, self._print0 = run_dir, keep, print0
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-writer")
        self._write_in_flight: Future[None] | None = None

    def save(self, content: dict[str, Any]) -> None:
        """Write `content` in the background, as it is now; first wait for the previous write."""
        self.flush()
        began = time.perf_counter()
        self._write_in_flight = self._executor.submit(self._write, copy_to_host(content))
        self.waited_seconds += time.perf_counter() - began

    @property
    def idle(self) -> bool:
        """Return whether no write is in flight."""
        return self._write_in_flight is None or self._write_in_flight.done()

    def flush(self) -> None:
        """Wait for the write in flight. An error of the program in the background thread is raised here."""
        began = time.perf_counter()
        if self._write_in_flight is not None:
            self._write_in_flight.result()
        self.waited_seconds += time.perf_counter() - began

    def _write(self, content: dict[str, Any]) -> None:
        step = content["state"]["step"]
        path = checkpoint_path(self._run_dir, step)
        try:
            save_checkpoint(path, content)
        except OSError as error:
            self._print0(f"WARNING: no checkpoint at step {step}: {error}; earlier checkpoints are unchanged")
            return
        self.newest = path
        self._apply_retention(step, content["state"]["best_step"])

    def _apply_retention(self, step: int, best_step: int) -> None:
        # Later checkpoints exist only after a resume that skipped them as corrupt: they neither count nor go.
        written = [path for its_step, path in checkpoints(self._run_dir).items() if its_step <= step]
        for old in written[self._keep :]:
            if old != checkpoint_path(self._run_dir, best_step):
                with contextlib.suppress(OSError):  # one too many does no harm
                    old.unlink()


def copy_to_host(content: Any) -> Any:
    """Copy dicts, lists and tuples, and every tensor in them to the CPU; other values are shared."""
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        return {key: copy_to_host(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(map(copy_to_host, content))
    return content
