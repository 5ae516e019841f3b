"""Processes and devices: accelerate's `Accelerator`, checked against what the launcher started."""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from cifar.config import TrainConfig
from cifar.errors import TrainingDivergedError, UserError

T = TypeVar("T")

# Ranks wait on the host for a download that local rank zero makes; the slowest known source needs an hour.
_HOST_TIMEOUT = timedelta(hours=3)


@dataclass(frozen=True)
class Launch:
    """What the launcher (torchrun, accelerate launch, mpirun, a plain `python`) says it started."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @classmethod
    def from_environment(cls) -> "Launch":
        """Read the launcher's variables; without any, this is one process on its own."""
        sizes = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
        world_size = int(next((os.environ[name] for name in sizes if name in os.environ), 1))
        return cls(
            rank=int(os.environ.get("RANK", 0)),
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            world_size=world_size,
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        )

    def check(self) -> None:
        """Refuse a launch that asked for several processes and started one.

        `accelerate launch --cpu --num_processes 2` starts a single process and sets no WORLD_SIZE; all it leaves
        of the wish is the address at which the processes were to meet (accelerate 1.15).

        Raises:
            UserError: this is such a launch.
        """
        by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
        if by_accelerate and "WORLD_SIZE" not in os.environ and self.world_size == 1:
            raise UserError(
                "accelerate launch was asked for several processes and started only this one: "
                "use `accelerate launch --config_file launch/accelerate.yaml --num_processes N train_ddp.py`, "
                "or `torchrun --nproc_per_node=N train_ddp.py`"
            )


class Runtime:
    """One process among `world_size`: its device, its way to the others, and rank zero's voice.

    Attributes:
        device: where the data, the net and the loss live.
        rank, local_rank, world_size: this process among all, and among those of its host.
        scaler: loss scaling for fp16, and a no-op for the other precisions.
    """

    def __init__(self, config: TrainConfig) -> None:
        """Join the other processes.

        Raises:
            UserError: the device or precision isn't to be had here, there are more processes than GPUs, or the
                processes that train are not those that the launcher started.
        """
        launch = Launch.from_environment()
        launch.check()
        device_type = choose_device(config.device, launch)
        if config.precision == "fp16" and device_type == "cpu":
            raise UserError("--precision fp16 needs a GPU: use bf16 or fp32 on the CPU")

        # Without cpu=True, accelerate on a host without GPUs ignores the launcher and trains separate copies.
        self.accelerator = Accelerator(
            cpu=device_type == "cpu",
            mixed_precision={"fp32": "no"}.get(config.precision, config.precision),
            # A gradient that is a view of its bucket is not copied before and after the exchange.
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.local_rank: int = self.accelerator.local_process_index
        self.world_size: int = self.accelerator.num_processes
        self.scaler = self.accelerator.scaler or torch.amp.GradScaler(self.device.type, enabled=False)
        if self.world_size != launch.world_size:
            raise UserError(
                f"the launcher started {launch.world_size} processes but {self.world_size} would train together: "
                f"start them with torchrun (device {self.device}, accelerate's {self.accelerator.distributed_type})"
            )
        if self.device.type == "cpu" and launch.local_world_size > 1:
            torch.set_num_threads(threads_per_process(launch.local_world_size))
        # Talk between the hosts' CPUs goes through gloo, so that it never waits for, or on, a GPU's stream.
        self._host_group: Any = None
        if dist.is_initialized():
            self._host_group = dist.new_group(backend="gloo", timeout=_HOST_TIMEOUT)

    @property
    def is_main(self) -> bool:
        """Whether this is rank zero, the one that speaks and writes."""
        return self.rank == 0

    def say(self, text: str = "") -> None:
        """Print one line, from rank zero only, without tearing a progress bar."""
        if self.is_main:
            from tqdm import tqdm

            tqdm.write(text)
            sys.stdout.flush()

    def wrap(self, net: nn.Module, compile: bool = False) -> nn.Module:
        """The net on this device, under autocast for bf16 and fp16, and in DistributedDataParallel for several ranks.

        `net` itself stays the bare module, on the same device and with the same parameters.
        """
        net.to(self.device)
        if compile:
            net.compile()  # in place, so that the names in the state dict stay the same
        return self.accelerator.prepare_model(net)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of `tensor` over all ranks, on each of them."""
        return self.accelerator.reduce(tensor, "mean")

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all ranks, on each of them (all_reduce)."""
        return self.accelerator.reduce(tensor, "sum")

    def broadcast_buffers(self, net: nn.Module) -> None:
        """Give every rank rank zero's buffers, such as BatchNorm's running statistics."""
        if dist.is_initialized():
            for buffer in net.buffers():
                dist.broadcast(buffer, src=0)

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, in rank order, on each of them. Host memory only: it never touches the device."""
        if self._host_group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._host_group)
        return values

    def from_main(self, value: T | None) -> T:
        """Rank zero's `value`, on every rank."""
        return self.gather(value)[0]  # type: ignore[return-value]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block that every rank enters and that fails on all of them if it fails on one.

        Raises:
            UserError: some rank raised it in the block; the text is the first such rank's.
        """
        mistake = None
        try:
            yield
        except UserError as error:
            mistake = f"{error}" + (f" [on host {socket.gethostname()}]" if not self.is_main else "")
        for said in self.gather(mistake):
            if said is not None:
                raise UserError(said) from None

    def describe(self) -> str:
        """Processes and devices in one phrase, for the banner."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type.upper()
        if self.world_size == 1:
            return f"1 process on {device}" + self._threads()
        backend = dist.get_backend()
        return f"{self.world_size} processes on {device} ({backend})" + self._threads()

    def _threads(self) -> str:
        threads = torch.get_num_threads()
        return f", {threads} thread{'s' if threads > 1 else ''} each" if self.device.type == "cpu" else ""

    def close(self) -> None:
        """Leave the other processes in order."""
        if dist.is_initialized():
            dist.destroy_process_group()


def choose_device(wanted: str, launch: Launch) -> str:
    """The type of device to train on: "cuda", "mps" or "cpu".

    Raises:
        UserError: the wanted device isn't here, or not as often as there are processes on this host.
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted == "auto":
        wanted = "cuda" if has_cuda else "mps" if has_mps and launch.world_size == 1 else "cpu"
    if wanted == "cuda":
        gpus = torch.cuda.device_count() if has_cuda else 0
        if gpus == 0:
            raise UserError("--device cuda: PyTorch finds no GPU here; use --device cpu")
        if launch.local_world_size > gpus:
            raise UserError(
                f"{launch.local_world_size} processes were started on this host, which has {gpus} GPU(s): "
                f"use --nproc_per_node={gpus}, or --device cpu"
            )
    if wanted == "mps" and not has_mps:
        raise UserError("--device mps: PyTorch finds no Apple GPU here; use --device cpu")
    if wanted == "mps" and launch.world_size > 1:
        raise UserError(f"--device mps trains in one process, not {launch.world_size}; use --device cpu")
    return wanted


def threads_per_process(local_world_size: int) -> int:
    """CPU threads for each of a host's processes: the user's OMP_NUM_THREADS, else cores / processes.

    torchrun sets OMP_NUM_THREADS to 1 when it is unset, so that a 1 says nothing of what the user wants.
    """
    wanted = int(os.environ.get("OMP_NUM_THREADS", 1))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return wanted if wanted > 1 else max(1, cores // local_world_size)


@contextlib.contextmanager
def one_voice(prog: str) -> Iterator[None]:
    """End the program on a mistake with one line on standard error, however many processes there are."""
    try:
        yield
    except (UserError, TrainingDivergedError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{prog}: error: {error}", file=sys.stderr, flush=True)
        else:
            # A launcher ends all ranks as soon as one has left: rank zero has to have spoken by then.
            time.sleep(5)
        raise SystemExit(error.status) from None
