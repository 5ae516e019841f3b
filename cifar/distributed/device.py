"""The device and the precision of a run, and what works on them."""

import dataclasses
from pathlib import Path
from typing import Literal

import torch

from cifar.config import TrainConfig
from cifar.distributed.cpu import available_cores
from cifar.distributed.environment import Launch
from cifar.errors import UserError, first_line

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]

_DRIVER = Path("/proc/driver/nvidia/gpus")  # NVIDIA's driver has a directory there for each GPU


def resolve(config: TrainConfig, launch: Launch) -> TrainConfig:
    """Return `config` with the device and the precision that "auto" stands for here.

    A UserError says which flag names what this host does not have. Rank zero warns of too few cores for the GPUs.
    """
    device = choose_device(config.device, launch)
    precision = choose_precision(config.precision, device)
    if precision == "fp16" and device == "cpu":
        raise UserError("--precision fp16 needs a GPU: use bf16 or fp32 on the CPU")
    if config.cuda_graph and (device != "cuda" or launch.world_size > 1):
        raise UserError("--cuda-graph needs a GPU and a single process")
    cores = available_cores()
    if device == "cuda" and launch.rank == 0 and cores < launch.local_world_size:
        print(
            f"WARNING: {launch.local_world_size} GPUs get their kernels from {cores} CPU core(s) of this host: ask the "
            f"scheduler for more, such as --cpus-per-gpu=4",
            flush=True,
        )
    return dataclasses.replace(config, device=device, precision=precision)


def choose_device(wanted: Device, launch: Launch) -> Device:
    """Return "cuda", "mps" or "cpu"; a UserError says if it is not here, or if a host has more processes than GPUs."""
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted == "auto":
        _check_driver(has_cuda)
        wanted = "cuda" if has_cuda else "mps" if has_mps and launch.world_size == 1 else "cpu"
    if wanted == "cuda":
        gpus = torch.cuda.device_count() if has_cuda else 0
        if gpus == 0:
            raise UserError("--device cuda: PyTorch finds no GPU here; use --device cpu")
        if launch.local_world_size > gpus:
            raise UserError(
                f"{launch.local_world_size} processes were started on this host, and this one sees {gpus} GPU(s): "
                f"let each see as many as there are processes, or use --nproc_per_node={gpus}, or --device cpu"
            )
        _check_hosts(gpus, launch)
    if wanted == "mps" and not has_mps:
        raise UserError("--device mps: PyTorch finds no Apple GPU here; use --device cpu")
    if wanted == "mps" and launch.world_size > 1:
        raise UserError(f"--device mps trains in one process, not {launch.world_size}; use --device cpu")
    return wanted


def _check_hosts(gpus: int, launch: Launch) -> None:
    """Refuse to train on one GPU of each host where an engine has started a single process, as for torchrun."""
    if launch.finds_host and launch.local_world_size == 1 < min(launch.world_size, gpus):
        raise UserError(
            f"{launch.world_size} processes were started, one on each host, and this host has {gpus} GPUs: start "
            f"`torchrun --nnodes $WORLD_SIZE --node-rank $RANK --nproc-per-node gpu --master-addr $MASTER_ADDR "
            f"--master-port $MASTER_PORT train_ddp.py` instead, or set CUDA_VISIBLE_DEVICES=0 to train on one of them"
        )


def _check_driver(has_cuda: bool) -> None:
    """Refuse to train on the CPU of a host whose GPUs torch cannot use, because of its driver or fabric manager."""
    if has_cuda or torch.version.cuda is None or not any(_DRIVER.glob("*")):
        return
    try:
        torch.cuda.init()
    except RuntimeError as error:
        reason = first_line(error)
        if "No CUDA GPUs are available" not in reason:  # hidden by CUDA_VISIBLE_DEVICES
            raise UserError(f"this host has GPUs that torch cannot use: {reason}; or use --device cpu") from error


def choose_precision(wanted: Precision, device_type: str) -> Precision:
    """Return the precision to train in: "fp32", "bf16" or "fp16"; for "auto", bf16 if the device computes in it."""
    if wanted != "auto":
        return wanted
    native = device_type == "cpu" and computes_in_bf16()
    if device_type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "fp32"


def computes_in_bf16() -> bool:
    """Return whether this CPU has bfloat16 instructions (AVX-512 BF16, AMX) and oneDNN uses them.

    Without them, bfloat16 is emulated: on an EPYC with AVX2, a step of `speed94` takes 16 times as long as in fp32.
    """
    names = ("avx512_bf16", "amx_bf16", "bf16")  # of x86 and of ARM
    capabilities = torch.cpu.get_capabilities()
    # Without oneDNN, as on a Mac, torch.ops.mkldnn is empty.
    uses_them = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return uses_them and any(capabilities.get(name) for name in names)


def check_compiler(device: torch.device) -> None:
    """Compile a small function: a UserError says that torch.compile does not work before anything is written."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # no compiler, no headers, a cache that cannot be written, ...
        lines = [line for line in str(error).splitlines() if line and not line.startswith("backend=")]
        reason = (lines or [type(error).__name__])[0]
        raise UserError(f"--compile does not work here ({reason}): install a C++ compiler, or leave it out") from error
