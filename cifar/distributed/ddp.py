"""Joining the other processes with accelerate, and the options of DistributedDataParallel."""

import inspect
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.nn.parallel import DistributedDataParallel

from cifar.config import TrainConfig
from cifar.distributed import rendezvous
from cifar.distributed.environment import Launch, prepare_libraries
from cifar.errors import UserError

_COMM_HOOKS = {
    "none": DDPCommunicationHookType.NO,
    "fp16": DDPCommunicationHookType.FP16,
    "bf16": DDPCommunicationHookType.BF16,
    "powersgd": DDPCommunicationHookType.POWER_SGD,
}


def join(config: TrainConfig, launch: Launch) -> Accelerator:
    """Make the process group; return accelerate's `Accelerator`, with the options of DDP.

    A UserError says if accelerate would train with another number of processes than the launcher started.
    """
    prepare_libraries()
    if not dist.is_initialized():  # accelerate keeps the device and precision of the last run in this process
        AcceleratorState._reset_state(reset_partial_state=True)
    # accelerate warns about the number of threads of a single CPU process, which torch has set well.
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")
    timeout = timedelta(seconds=config.timeout)
    accelerator = Accelerator(
        # Without cpu=True, accelerate on a host without GPUs ignores the launcher and trains separate copies.
        cpu=config.device == "cpu",
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        kwargs_handlers=[InitProcessGroupKwargs(init_method=rendezvous.init_method(config), timeout=timeout)],
    )
    accelerator.ddp_handler = ddp_options(config.comm_hook, batched_copies=config.device == "cuda")
    if accelerator.num_processes != launch.world_size:
        raise UserError(
            f"the launcher started {launch.world_size} processes but {accelerator.num_processes} would train together: "
            f"start them with torchrun (device {accelerator.device}, accelerate's {accelerator.distributed_type})"
        )
    return accelerator


def unwrap(model: nn.Module) -> nn.Module:
    """Return the bare module of a model that may be wrapped in DistributedDataParallel."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def settle_buckets(model: nn.Module, images: Tensor) -> None:
    """Let DDP lay out the buckets of the gradients as in all later steps. Collective; trains nothing.

    DDP fills them in the order of definition in its first step, and in the order in which the gradients become ready in
    the others. With three ranks or more, the place of a gradient decides at which rank its sum begins, and so its last
    bits: the first step after a resume would differ from the same step of a run that was not stopped. It also connects
    the ranks, which NCCL does in the first exchange. The model gets zeros in the shape of `images`.
    """
    if unwrap(model) is model:
        return
    buffers = [buffer.clone() for buffer in model.buffers()]  # the statistics of BatchNorm
    with torch.compiler.set_stance("force_eager"):  # compiled code would be specialized to this batch
        model(torch.zeros_like(images, dtype=torch.float32)).sum().backward()
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)
    model.zero_grad()


class HookMemory:
    """Save and restore what a communication hook remembers on this rank; nothing unless it is PowerSGD.

    PowerSGD keeps the number of its steps, the first of which send whole gradients; the error that compression has left
    in the gradients of this rank; and the factors P and Q of the last step, from which the next one begins. It draws
    random numbers in its first compressed step only, always from the same seed.
    """

    _DICTS = ("error_dict", "p_memory_dict", "q_memory_dict")  # by bucket, flat

    def __init__(self, model: nn.Module) -> None:
        """Find the hook of a model that may be wrapped in DistributedDataParallel; `settle_buckets` has run."""
        hooks = getattr(model, "_comm_hooks", ())  # accelerate makes the hook and keeps no reference to it
        self._powersgd = next((state for _, state in hooks if isinstance(state, PowerSGDState)), None)
        # The elements of a gradient lie in a bucket in the order of its parameter's.
        self._layout = [list(parameter.stride()) for parameter in model.parameters()]
        self._device = next(model.parameters()).device

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as tensors and plain data; they change with the next step."""
        if self._powersgd is None:
            return {}
        memory = {name: getattr(self._powersgd, name) for name in self._DICTS}
        return {"iter": self._powersgd.iter, "layout": self._layout, **memory}

    def load_state_dict(self, memory: dict[str, Any]) -> bool:
        """Restore what `state_dict` returned on this rank; return whether the hook begins again instead.

        It does without a memory, and with one of another memory format, in which the elements have another order.
        """
        if self._powersgd is None:
            return False
        if memory.get("layout") != self._layout:
            return True
        self._powersgd.iter = memory["iter"]
        for name in self._DICTS:
            setattr(self._powersgd, name, {bucket: flat.to(self._device) for bucket, flat in memory[name].items()})
        return False


@dataclass
class _DDPKwargs(DistributedDataParallelKwargs):
    """accelerate's options, and one that it lacks. (Its constructor takes no derived class.)"""

    batched_grad_copy: bool = False


def ddp_options(comm_hook: str, batched_copies: bool = False) -> DistributedDataParallelKwargs:
    """Return the options of DistributedDataParallel.

    With `batched_copies`, two kernels copy the gradients of a bucket into it, instead of one for each (torch 2.14).
    """
    powersgd = comm_hook == "powersgd"
    has_batched_copies = "batched_grad_copy" in inspect.signature(DistributedDataParallel).parameters
    return _DDPKwargs(
        batched_grad_copy=batched_copies and has_batched_copies,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,  # they are averaged before each evaluation
        # The first bucket holds 1 MiB, torch's default, for accelerate drops a cap of 25 as the default that it is; any
        # other value would count for the first bucket, too, and delay the first exchange.
        # PowerSGD runs several collectives per bucket, from callbacks whose order may differ between ranks, which then
        # deadlock (seen over gloo, torch 2.15): one bucket for all gradients.
        bucket_cap_mb=4096 if powersgd else 25,
        comm_hook=_COMM_HOOKS[comm_hook],
        # Vogels et al. 2019 (arXiv 1905.13727). The first steps' gradients are the least alike and are sent whole: 20
        # of them, besides those that `settle_buckets` drops.
        comm_state_option={"matrix_approximation_rank": 4, "start_powerSGD_iter": 21} if powersgd else {},
    )
