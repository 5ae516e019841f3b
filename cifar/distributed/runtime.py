"""Processes and devices: accelerate's `Accelerator`, checked against what the launcher started."""

import contextlib
import socket
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from cifar.distributed import rendezvous
from cifar.config import TrainConfig
from cifar.distributed.cpu import SMALL_BATCH, keep_freed_memory, plain_convolutions
from cifar.errors import UserError
from cifar.distributed.heartbeat import Heartbeat
from cifar.distributed.environment import Launch, threads_per_process

T = TypeVar("T")

# Ranks wait on the host for a download that local rank zero makes; the slowest known source needs an hour.
_HOST_TIMEOUT = timedelta(hours=3)


class Runtime:
    """One process among `world_size`: its device, its way to the others, and rank zero's voice.

    Attributes:
        device: where the data, the net and the loss live.
        rank, local_rank, world_size: this process among all, and among those of its host.
        scaler: loss scaling for fp16, and a no-op for the other precisions.
        layout: memory format of images and filters.
    """

    def __init__(self, config: TrainConfig) -> None:
        """Join the other processes.

        Raises:
            UserError: the device or precision isn't to be had here, there are more processes than GPUs, or the
                processes that train are not those that the launcher started.
        """
        self.launch = launch = Launch.from_environment()
        launch.check()
        device_type = choose_device(config.device, launch)
        if config.precision == "fp16" and device_type == "cpu":
            raise UserError("--precision fp16 needs a GPU: use bf16 or fp32 on the CPU")

        if config.cuda_graph and (device_type != "cuda" or launch.world_size > 1):
            raise UserError("--cuda-graph needs a GPU and a single process")

        # Without cpu=True, accelerate on a host without GPUs ignores the launcher and trains separate copies.
        # accelerate warns when a single process leaves the number of threads to it.
        warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")
        self.accelerator = Accelerator(
            cpu=device_type == "cpu",
            mixed_precision={"fp32": "no"}.get(config.precision, config.precision),
            kwargs_handlers=[
                ddp_options(config.comm_hook),
                InitProcessGroupKwargs(init_method=rendezvous.METHOD, timeout=timedelta(seconds=config.timeout)),
            ],
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
        if self.device.type == "cpu":
            keep_freed_memory()
        # oneDNN, and cuDNN with tensor cores, have the faster kernels for channels-last.
        small = config.local_batch_size <= SMALL_BATCH and config.precision == "fp32"
        self._plain = self.device.type == "cpu" and small
        self.layout = torch.contiguous_format if self._plain else torch.channels_last
        # Talk between the hosts' CPUs goes through gloo, so that it never waits for, or on, a GPU's stream.
        self._host_group: Any = None
        self._vote_group: Any = None
        self._heartbeat: Heartbeat | None = None
        if dist.is_initialized():
            self._host_group = dist.new_group(backend="gloo", timeout=_HOST_TIMEOUT)
            self._vote_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.timeout))
            self._heartbeat = Heartbeat(self.rank, self.world_size, config.timeout, *launch.store(), self.gather)

    @property
    def is_main(self) -> bool:
        """Whether this is rank zero, the one that speaks and writes."""
        return self.rank == 0

    def print0(self, text: str = "") -> None:
        """Print one line, from rank zero only, without tearing a progress bar."""
        if self.is_main:
            from tqdm import tqdm

            tqdm.write(text)
            sys.stdout.flush()

    def wrap(self, net: nn.Module, compile: bool = False) -> nn.Module:
        """The net on this device, under autocast for bf16 and fp16, and in DistributedDataParallel for several ranks.

        `net` itself stays the bare module, on the same device and with the same parameters.
        """
        net.to(self.device).to(memory_format=self.layout)
        if compile:
            net.compile()  # in place, so that the names in the state dict stay the same
        with warnings.catch_warnings():
            # torch 2.15 would have other options, which torch 2.11 and accelerate 1.15 don't know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return self.accelerator.prepare_model(net)

    def convolutions(self) -> contextlib.AbstractContextManager[None]:
        """A block that trains, and uses the convolution kernels that suit the local batch."""
        return plain_convolutions() if self._plain else contextlib.nullcontext()

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

    def start_max(self, tensor: Tensor) -> "PendingAllReduce":
        """Start finding the elementwise maximum of `tensor`, which is on the CPU, over all ranks."""
        return PendingAllReduce(tensor, dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._vote_group, async_op=True))

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, in rank order, on each of them. Host memory only: it never touches the device."""
        if self._host_group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._host_group)
        return values

    def from_main(self, value: T | None) -> T:
        """Rank zero's `value`, on every rank. Host memory only."""
        values = [value]
        if self._host_group is not None:
            dist.broadcast_object_list(values, src=0, group=self._host_group)
        return values[0]  # type: ignore[return-value]

    @contextlib.contextmanager
    def fail_together(self) -> Iterator[None]:
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
        hosts = f", on {self.launch.hosts} hosts" if self.launch.hosts > 1 else ""
        return f"{self.world_size} processes on {device} ({backend})" + self._threads() + hosts

    def _threads(self) -> str:
        threads = torch.get_num_threads()
        return f", {threads} thread{'s' if threads > 1 else ''} each" if self.device.type == "cpu" else ""

    def close(self) -> None:
        """Leave the other processes in order."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
        if dist.is_initialized():
            dist.destroy_process_group()


class PendingAllReduce:
    """A tensor that other ranks still add to."""

    def __init__(self, tensor: Tensor, work: Any) -> None:
        self._tensor, self._work = tensor, work

    def result(self) -> list[float]:
        """The numbers, once they have come in."""
        self._work.wait()
        return self._tensor.tolist()


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


_COMM_HOOKS = {
    "none": DDPCommunicationHookType.NO,
    "fp16": DDPCommunicationHookType.FP16,
    "bf16": DDPCommunicationHookType.BF16,
    "powersgd": DDPCommunicationHookType.POWER_SGD,
}
# Vogels et al. 2019 (arXiv 1905.13727): gradient matrices as products of two thin ones, once the first steps, whose
# gradients are least like those before, are done. What was lost is added to the next step's gradient.
_POWER_SGD = {"matrix_approximation_rank": 4, "start_powerSGD_iter": 20}

_ONE_BUCKET = 4096  # MB


def ddp_options(comm_hook: str) -> DistributedDataParallelKwargs:
    """How DistributedDataParallel exchanges gradients.

    A gradient that is a view of its bucket is not copied before and after the exchange. Buffers are rank zero's when
    it counts, before an evaluation, and need no exchange in every step.
    """
    return DistributedDataParallelKwargs(
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
        # PowerSGD exchanges several times a bucket, from callbacks whose order between two buckets may differ between
        # ranks, which then wait for each other for good (seen over gloo, torch 2.15): all gradients in one bucket.
        bucket_cap_mb=_ONE_BUCKET if comm_hook == "powersgd" else 25,
        comm_hook=_COMM_HOOKS[comm_hook],
        comm_state_option=_POWER_SGD if comm_hook == "powersgd" else {},
    )
