"""Processes and devices: accelerate's `Accelerator`, checked against the launcher's environment."""

import contextlib
import itertools
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cifar.config import TrainConfig
from cifar.distributed import cpu
from cifar.distributed.ddp import join
from cifar.distributed.device import check_compiler
from cifar.distributed.environment import Launch
from cifar.distributed.heartbeat import Heartbeat
from cifar.errors import LocalError, StoppedError, TrainingDivergedError, UserError

T = TypeVar("T")

# At the start, ranks wait for a download that local rank zero makes; the slowest known source needs an hour.
_HOST_TIMEOUT = timedelta(hours=3)

_numbers = itertools.count(1)  # of the runs of this process


class Runtime:
    """One process of the run: its place, its device, its precision and its collectives."""

    def __init__(self, config: TrainConfig) -> None:
        """Join the other processes; a UserError, the same on all of them, names what they would not run the same.

        `config` has a concrete device and precision; see `device.resolve`.
        """
        self.launch = launch = Launch.from_environment()
        # A restart by torchrun finds the run of this launch by it; None without torchrun.
        self.launch_id = launch.identify(next(_numbers))
        self.precision = config.precision  # "fp32", "bf16" or "fp16"; the same on all ranks
        self.accelerator = join(config, launch)
        self.device: torch.device = self.accelerator.device  # of the images, the model and the loss
        self.rank, self.local_rank, self.world_size = launch.rank, launch.local_rank, launch.world_size
        # Scales the loss under fp16.
        self.scaler = self.accelerator.scaler or torch.amp.GradScaler(self.device.type, enabled=False)
        # oneDNN, and cuDNN with tensor cores, are faster with channels-last; torch's kernels for tiny batches are not.
        is_fp32_on_cpu = self.device.type == "cpu" and self.precision == "fp32"
        is_small = config.local_batch_size <= cpu.SMALL_BATCH and config.model in cpu.NATIVE_MODELS
        self._native_convolutions = is_fp32_on_cpu and is_small
        self.memory_format = torch.contiguous_format if self._native_convolutions else torch.channels_last
        self._trains_small_batches = is_fp32_on_cpu and config.evaluate is None
        self._local_batch_size = config.local_batch_size
        self._threads_before: int | None = None
        if self.device.type == "cpu":
            torch.set_num_threads(cpu.threads_per_process(launch.local_world_size))
            cpu.keep_freed_memory()
        # Host-side messages use gloo, so that they never wait for a GPU's stream, nor a stream for them.
        self._host_group: Any = None
        self._vote_group: Any = None
        self._heartbeat: Heartbeat | None = None
        if dist.is_initialized():
            self._host_group = dist.new_group(backend="gloo", timeout=_HOST_TIMEOUT)
            self._vote_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.timeout))
            self._heartbeat = Heartbeat(self.rank, self.world_size, config.timeout, *launch.store(), self.gather)

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

        The bare module, `unwrap(...)`, is moved in place and keeps its parameters. If torch.compile does not work on
        some host, a UserError on all of them says why.
        """
        model.to(self.device).to(memory_format=self.memory_format)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        if self._trains_small_batches and cpu.is_small_work(self._local_batch_size, parameters):
            self._threads_before = torch.get_num_threads()
            torch.set_num_threads(1)
        if compile:
            with self.fail_together():
                check_compiler(self.device)
            model.compile()  # in place: the names in the state dict stay the same
        with warnings.catch_warnings():
            # torch 2.15 deprecates an option for one that torch 2.11 and accelerate 1.15 do not have.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return self.accelerator.prepare_model(model)

    def seed_layers(self, seed: int) -> None:
        """Seed the generators that random layers, such as dropout, draw from."""
        # torch.manual_seed, for all devices, takes 0.3 ms where CUDA has not been initialized.
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def accumulate(self, model: nn.Module, batches: Sequence[T]) -> Iterator[T]:
        """Yield the micro-batches of a step; DDP averages the gradients in the backward pass of the last one only."""
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
        return cpu.native_convolutions() if self._native_convolutions else contextlib.nullcontext()

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of `tensor` over all ranks, on every rank (all_reduce)."""
        return self.accelerator.reduce(tensor, "mean")

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over all ranks, on every rank (all_reduce)."""
        return self.accelerator.reduce(tensor, "sum")

    def average_buffers(self, model: nn.Module) -> None:
        """Replace floating-point buffers, such as BatchNorm's running statistics, by their mean over all ranks."""
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        if self.world_size > 1 and buffers:
            means = self.mean(torch.cat([buffer.flatten() for buffer in buffers]))
            for buffer, mean in zip(buffers, means.split([buffer.numel() for buffer in buffers]), strict=True):
                buffer.copy_(mean.view_as(buffer))

    def start_max(self, tensor: Tensor) -> dist.Work:
        """Start an all-reduce, the elementwise maximum, of `tensor` on the CPU; `wait()` of the result completes it."""
        return dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._vote_group, async_op=True)

    def gather(self, value: T) -> list[T]:
        """Return the `value` of every rank, in rank order, on every rank. Uses host memory only, never the device."""
        if self._host_group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._host_group)
        return values

    def from_main(self, value: T | None) -> T:
        """Return rank zero's `value` on every rank. Uses host memory only."""
        values = [value]
        if self._host_group is not None:
            dist.broadcast_object_list(values, src=0, group=self._host_group)
        return values[0]  # type: ignore[return-value]

    def end_start(self) -> None:
        """Wait for all ranks; from now on, one that does not answer within `--timeout` ends the run. Collective."""
        self.gather(None)
        self._host_group = self._vote_group

    @contextlib.contextmanager
    def fail_together(self) -> Iterator[None]:
        """Run a block on every rank; if some raise a UserError in it, raise that of the lowest such rank on all."""
        mistake = None
        try:
            yield
        except UserError as error:
            mistake = f"{error}" + (f" [on host {socket.gethostname()}]" if not self.is_main else "")
        for text in self.gather(mistake):
            if text is not None:
                raise UserError(text) from None

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
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
