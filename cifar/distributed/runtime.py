"""Processes and devices: accelerate's `Accelerator`, checked against the launcher's environment."""

import contextlib
import dataclasses
import inspect
import itertools
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from cifar.config import TrainConfig
from cifar.distributed import rendezvous
from cifar.distributed.cpu import SMALL_BATCH, SMALL_WORK, available_cores, keep_freed_memory, native_convolutions
from cifar.distributed.device import check_compiler, choose_device, choose_precision, computes_in_bf16
from cifar.distributed.environment import Launch, chosen_threads, prepare_nccl, threads_per_process
from cifar.distributed.heartbeat import Heartbeat
from cifar.errors import LocalError, StoppedError, TrainingDivergedError, UserError

T = TypeVar("T")

# At the start, ranks wait for a download that local rank zero makes; the slowest known source needs an hour.
_HOST_TIMEOUT = timedelta(hours=3)

_numbers = itertools.count(1)  # of the runs of this process


class Runtime:
    """One process of the run: its device, its precision and its collectives.

    Attributes:
        launch: what the launcher started.
        launch_id: by which a restart by torchrun finds the run of this launch; None without torchrun.
        accelerator: accelerate's.
        device: device of the images, the model and the loss.
        rank, local_rank, world_size: of this process; local ranks count the processes of one host.
        precision: "fp32", "bf16" or "fp16"; the same on all ranks.
        scaler: loss scaler for fp16; disabled for other precisions.
        memory_format: of images and filters.
    """

    def __init__(self, config: TrainConfig) -> None:
        """Join the other processes.

        Raises:
            UserError: the device or precision is not available, there are more processes than GPUs, the ranks
                would not run the same, or accelerate would train with another number of processes than the launcher
                started.
            LocalError: this rank's device does not support bf16.
        """
        self.launch = launch = Launch.from_environment()
        launch.check()
        self.launch_id = launch.identify(next(_numbers))
        device_type = choose_device(config.device, launch)
        if config.precision == "fp16" and device_type == "cpu":
            raise UserError("--precision fp16 needs a GPU: use bf16 or fp32 on the CPU")
        if config.cuda_graph and (device_type != "cuda" or launch.world_size > 1):
            raise UserError("--cuda-graph needs a GPU and a single process")

        self.precision = choose_precision(config.precision, device_type)
        self._chosen = config.precision == "auto"
        prepare_nccl()
        if not dist.is_initialized():  # accelerate keeps the device and precision of the last run in this process
            AcceleratorState._reset_state(reset_partial_state=True)
        # accelerate warns about the number of threads of a single CPU process, which torch has set well.
        warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")
        # Without cpu=True, accelerate on a host without GPUs ignores the launcher and trains separate copies.
        try:
            self.accelerator = Accelerator(
                cpu=device_type == "cpu",
                mixed_precision={"fp32": "no"}.get(self.precision, self.precision),
                kwargs_handlers=[
                    InitProcessGroupKwargs(
                        init_method=rendezvous.init_method(
                            dataclasses.replace(config, device=device_type, precision=self.precision)
                        ),
                        timeout=timedelta(seconds=config.timeout),
                    ),
                ],
            )
        except ValueError as error:
            if config.precision != "bf16" or "bf16" not in str(error):
                raise
            device = torch.cuda.get_device_name() if device_type == "cuda" else f"this {device_type.upper()} device"
            raise LocalError(f"--precision bf16: {device} does not support it; use fp16 or fp32") from error
        self.device: torch.device = self.accelerator.device
        self.accelerator.ddp_handler = _ddp_kwargs(config.comm_hook, batched_copies=self.device.type == "cuda")
        self.rank: int = self.accelerator.process_index
        self.local_rank: int = self.accelerator.local_process_index
        self.world_size: int = self.accelerator.num_processes
        self.scaler = self.accelerator.scaler or torch.amp.GradScaler(self.device.type, enabled=False)
        if self.world_size != launch.world_size:
            raise UserError(
                f"the launcher started {launch.world_size} processes but {self.world_size} would train together: "
                f"start them with torchrun (device {self.device}, accelerate's {self.accelerator.distributed_type})"
            )
        if self.device.type == "cpu":
            # A single process keeps torch's number, which respects OMP_NUM_THREADS but no container's quota.
            alone = min(torch.get_num_threads(), available_cores())
            torch.set_num_threads(
                alone if launch.local_world_size == 1 else threads_per_process(launch.local_world_size)
            )
            keep_freed_memory()
        # oneDNN, and cuDNN with tensor cores, are faster with channels-last; torch's kernels for tiny batches are not.
        small = config.local_batch_size <= SMALL_BATCH and self.precision == "fp32"
        self._native_convolutions = self.device.type == "cpu" and small
        self.memory_format = torch.contiguous_format if self._native_convolutions else torch.channels_last
        self._threads_before: int | None = None
        self._small_batch = config.local_batch_size if self._native_convolutions and config.evaluate is None else None
        # Host-side messages use gloo, so that they never wait for a GPU's stream, nor a stream for them.
        self._host_group: Any = None
        self._vote_group: Any = None
        self._heartbeat: Heartbeat | None = None
        if dist.is_initialized():
            self._host_group = dist.new_group(backend="gloo", timeout=_HOST_TIMEOUT)
            self._vote_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.timeout))
            self._heartbeat = Heartbeat(self.rank, self.world_size, config.timeout, *launch.store(), self.gather)
        if self.precision == "bf16" and self.device.type == "cpu" and not computes_in_bf16():
            self.print0(
                "WARNING: this CPU has no bfloat16 instructions: bf16 is emulated, and many times slower than fp32"
            )
        cores = available_cores()
        if self.device.type == "cuda" and cores < launch.local_world_size:
            self.print0(
                f"WARNING: {launch.local_world_size} GPUs get their kernels from {cores} CPU core(s) of this host: ask "
                f"the scheduler for more, such as --cpus-per-gpu=4"
            )
        if config.compile:
            with self.fail_together():
                check_compiler(self.device)

    @property
    def is_main(self) -> bool:
        """Return whether this is rank zero, the one that prints and writes."""
        return self.rank == 0

    @property
    def peer_is_gone(self) -> bool:
        """Return whether another rank has ended without `close`, by a signal or an error."""
        return self._heartbeat is not None and self._heartbeat.peer_is_gone

    def note_step(self, step: int, last: bool) -> None:
        """Note the end of a training step, by which the heartbeat notices one that does not end."""
        if self._heartbeat is not None:
            self._heartbeat.note_step(step, last)

    def print0(self, text: str = "") -> None:
        """Print one line from rank zero, above the progress bar if there is one."""
        if self.is_main:
            from tqdm import tqdm

            tqdm.write(text)
            sys.stdout.flush()

    def prepare(self, model: nn.Module, compile: bool = False) -> nn.Module:
        """Return the model on this device, under autocast for bf16 and fp16, wrapped in DDP if there are several ranks.

        The bare module, `unwrap(...)`, is moved in place and keeps its parameters.
        """
        model.to(self.device).to(memory_format=self.memory_format)
        if self._small_batch is not None and chosen_threads() is None:
            work = self._small_batch * sum(parameter.numel() for parameter in model.parameters())
            if work <= SMALL_WORK:
                self._threads_before = torch.get_num_threads()
                torch.set_num_threads(1)
        if compile:
            model.compile()  # in place: the names in the state dict stay the same
        with warnings.catch_warnings():
            # torch 2.15 deprecates an option for one that torch 2.11 and accelerate 1.15 do not have.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return self.accelerator.prepare_model(model)

    def settle_buckets(self, model: nn.Module, images: Tensor) -> None:
        """Let DDP lay out the buckets of the gradients as in all later steps. Collective; trains nothing.

        DDP fills them in the order of definition in its first step, and in the order in which the gradients become
        ready in the others. With three ranks or more, the place of a gradient decides at which rank its sum begins, and
        so its last bits: the first step after a resume would differ from the same step of a run that was not stopped.
        It also connects the ranks, which NCCL does in the first exchange.

        Args:
            images: the shape of this batch is what the model gets.
        """
        if self.world_size == 1:
            return
        buffers = [buffer.clone() for buffer in model.buffers()]  # the statistics of BatchNorm
        with torch.compiler.set_stance("force_eager"):  # compiled code would be specialized to this batch
            model(torch.zeros_like(images, dtype=torch.float32)).sum().backward()
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        model.zero_grad()

    def seed_layers(self, seed: int) -> None:
        """Seed the generators that random layers, such as dropout, draw from."""
        # torch.manual_seed, for all devices, takes 0.3 ms where CUDA has not been initialized.
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def accumulate(self, model: nn.Module, batches: Sequence[T]) -> Iterator[T]:
        """Yield the micro-batches of a step; DDP exchanges the gradients in the backward pass of the last one only."""
        for batch in batches[:-1]:
            with self.accelerator.no_sync(model):
                yield batch
        yield batches[-1]

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, scaled under fp16, to the parameters' `.grad`."""
        self.scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the parameters; under fp16, unscale the gradients first and skip the update if one overflowed."""
        self.scaler.step(optimizer)
        self.scaler.update()

    def convolutions(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which convolutions use the kernels that are fastest for the local batch size."""
        return native_convolutions() if self._native_convolutions else contextlib.nullcontext()

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of `tensor` over all ranks, on every rank (all_reduce)."""
        return self.accelerator.reduce(tensor, "mean")

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over all ranks, on every rank (all_reduce)."""
        return self.accelerator.reduce(tensor, "sum")

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Copy rank zero's buffers, such as BatchNorm's running statistics, to every rank."""
        if dist.is_initialized():
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def start_max(self, tensor: Tensor) -> "PendingAllReduce":
        """Start an all-reduce (elementwise maximum) of `tensor`, which is on the CPU."""
        return PendingAllReduce(
            tensor, dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._vote_group, async_op=True)
        )

    def gather(self, value: T) -> list[T]:
        """Return the `value` of every rank, in rank order, on every rank. Uses host memory only, never the device."""
        if self._host_group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._host_group)
        return values

    def end_start(self) -> None:
        """Wait for all ranks; from now on, one that does not answer within `--timeout` ends the run. Collective."""
        self.gather(None)
        self._host_group = self._vote_group

    def from_main(self, value: T | None) -> T:
        """Return rank zero's `value` on every rank. Uses host memory only."""
        values = [value]
        if self._host_group is not None:
            dist.broadcast_object_list(values, src=0, group=self._host_group)
        return values[0]  # type: ignore[return-value]

    @contextlib.contextmanager
    def fail_together(self) -> Iterator[None]:
        """Run a block on every rank; if one rank fails with a UserError, raise it on all of them.

        Raises:
            UserError: some rank raised it in the block; the text is that of the lowest such rank.
        """
        mistake = None
        try:
            yield
        except UserError as error:
            mistake = f"{error}" + (f" [on host {socket.gethostname()}]" if not self.is_main else "")
        for text in self.gather(mistake):
            if text is not None:
                raise UserError(text) from None

    def describe(self) -> str:
        """Return processes and devices in one phrase, for the banner."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type.upper()
        if self.world_size == 1:
            gpus = torch.cuda.device_count() if self.device.type == "cuda" else 1
            others = f", 1 of {gpus} GPUs (torchrun --nproc_per_node=gpu uses all)" if gpus > 1 else ""
            return f"1 process on {device}" + self._threads() + others
        backend = dist.get_backend()
        hosts = f", on {self.launch.hosts} hosts" if self.launch.hosts > 1 else ""
        return f"{self.world_size} processes on {device} ({backend})" + self._threads() + hosts

    def describe_precision(self) -> str:
        """Return the precision in one phrase, for the banner."""
        if not self._chosen:
            return self.precision
        how = "only by emulation" if self.precision == "fp32" else "natively"
        return f"{self.precision} (auto: this device computes in bf16 {how})"

    def _threads(self) -> str:
        threads = torch.get_num_threads()
        return f", {threads} thread{'s' if threads > 1 else ''} each" if self.device.type == "cpu" else ""

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A rank that fails alone leaves by the end of its process, which the others notice. The destructors of gloo and
        # NCCL would wait for them.
        common = (UserError, TrainingDivergedError, StoppedError, type(None))
        if self.world_size == 1 or (isinstance(error, common) and not isinstance(error, LocalError)):
            self.close()

    def close(self) -> None:
        """Leave the process group in order, and give the next run of this process its CPU threads back."""
        if self._threads_before is not None:
            torch.set_num_threads(self._threads_before)
        if self._heartbeat is not None:
            self._heartbeat.stop()
        if dist.is_initialized():
            dist.destroy_process_group()


class PendingAllReduce:
    """An all-reduce in flight; `result()` waits for it."""

    def __init__(self, tensor: Tensor, work: Any) -> None:
        self._tensor, self._work = tensor, work

    def result(self) -> list[float]:
        """Return the reduced tensor as a list."""
        self._work.wait()
        return self._tensor.tolist()


def unwrap(model: nn.Module) -> nn.Module:
    """Return the bare module of a model that may be wrapped in DistributedDataParallel."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


@dataclass
class _DDPKwargs(DistributedDataParallelKwargs):
    """accelerate's options, and one that it lacks. (Its constructor takes no derived class.)"""

    batched_grad_copy: bool = False


def _ddp_kwargs(comm_hook: str, batched_copies: bool = False) -> DistributedDataParallelKwargs:
    """Return the options of DistributedDataParallel.

    Rank 0 broadcasts its buffers before each evaluation, so DDP need not do it in every step. The first bucket holds 1
    MiB, torch's default, for accelerate drops a `bucket_cap_mb` of 25 as the default that it is; any other value would
    count for the first bucket, too, and delay the first exchange.

    Args:
        batched_copies: copy the gradients of a bucket into it in two kernels instead of one for each (torch 2.14).
    """
    powersgd = comm_hook == "powersgd"
    known = "batched_grad_copy" in inspect.signature(nn.parallel.DistributedDataParallel).parameters
    return _DDPKwargs(
        batched_grad_copy=batched_copies and known,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
        # PowerSGD runs several collectives per bucket, from callbacks whose order may differ between ranks, which then
        # deadlock (seen over gloo, torch 2.15): one bucket for all gradients.
        bucket_cap_mb=4096 if powersgd else 25,
        comm_hook=_COMM_HOOKS[comm_hook],
        # Vogels et al. 2019 (arXiv 1905.13727). The first steps' gradients are the least alike and are sent whole: 20
        # of them, besides those that `Runtime.settle_buckets` drops.
        comm_state_option={"matrix_approximation_rank": 4, "start_powerSGD_iter": 21} if powersgd else {},
    )


_COMM_HOOKS = {
    "none": DDPCommunicationHookType.NO,
    "fp16": DDPCommunicationHookType.FP16,
    "bf16": DDPCommunicationHookType.BF16,
    "powersgd": DDPCommunicationHookType.POWER_SGD,
}
