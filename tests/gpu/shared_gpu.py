"""Run train_ddp.py with several ranks on one GPU, over gloo: NCCL refuses two ranks on one GPU.

    torchrun --nproc_per_node=4 -m tests.gpu.shared_gpu --recipe wide ...

All else is what several GPUs would run: DDP on CUDA tensors, its hooks, the host groups, checkpoints, restarts.
"""

import functools
from typing import Any

import torch

from cifar.command import exit_on_error
from cifar.distributed import ddp, device
from train_ddp import main


class SharedGpuDDP(torch.nn.parallel.DistributedDataParallel):
    """DDP on the only GPU; accelerate names the GPU of the local rank."""

    def __init__(self, module: torch.nn.Module, **options: Any) -> None:
        super().__init__(module, **options | {"device_ids": [0], "output_device": 0})


if torch.cuda.is_available():
    torch.nn.parallel.DistributedDataParallel = SharedGpuDDP  # type: ignore[misc]
    device.choose_device = lambda wanted, launch: "cuda"
    ddp.InitProcessGroupKwargs = functools.partial(ddp.InitProcessGroupKwargs, backend="gloo")  # type: ignore[misc, assignment]

if __name__ == "__main__":
    with exit_on_error("train_ddp.py"):
        main()
