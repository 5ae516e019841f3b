"""Settings that speed up training on a CPU."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from cifar.distributed.environment import chosen_threads

SMALL_BATCH = 4  # images up to which these models' native convolutions are faster than oneDNN's
# A step of net-wide takes 3.8 instead of 4.6 ms, but one of resnet18 213 instead of 115 (two cores, torch 2.14).
NATIVE_MODELS = ("net", "net-wide")
# Parameters x images of such a batch up to which one thread is as fast as two, which mostly wait for each other: a step
# of the tutorial's Net takes 3.2 ms with one thread and 3.1 with two, but beside one busy process 3.0 and 178 (two
# cores, torch 2.14).
_SMALL_WORK = 1_000_000

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from <malloc.h>


def available_cores(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the number of cores that this process may use: affinity, and a container's CPU quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own_group = root
    with contextlib.suppress(OSError):  # no Linux
        own_group = root / proc.read_text().strip().rpartition("0::/")[2]
    for group in (own_group, *own_group.parents):  # a quota binds all groups below it
        with contextlib.suppress(OSError, ValueError):  # "max", or no such file: no quota
            quota, period = map(int, (group / "cpu.max").read_text().split())
            cores = min(cores, max(1, quota // period))
    return cores


def threads_per_process(local_world_size: int) -> int:
    """Return the number of CPU threads for each process of a host: the user's, else usable cores / processes."""
    if local_world_size == 1:  # torch's own number respects OMP_NUM_THREADS, but no container's quota
        return min(torch.get_num_threads(), available_cores())
    return chosen_threads() or max(1, available_cores() // local_world_size)


def is_small_work(batch_size: int, parameters: int) -> bool:
    """Return whether one thread trains as fast as several on such batches, and the user has chosen no number."""
    return batch_size <= SMALL_BATCH and batch_size * parameters <= _SMALL_WORK and chosen_threads() is None


def keep_freed_memory() -> None:
    """Keep freed memory in this process instead of returning it to the kernel (glibc only; else a no-op).

    Else each large tensor faults in its pages again: 40 % of the time of a `speed94` step on two CPU cores. Peak memory
    stays the same.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


@contextlib.contextmanager
def native_convolutions() -> Iterator[None]:
    """Run a block with torch's native convolutions instead of oneDNN's, which reorders its inputs first.

    With the tutorial's 4 images, a step of the Net takes 0.9 ms instead of 1.1 (two cores, torch 2.14).
    """
    # torch.backends.mkldnn.flags does the same, but warns about Intel GPUs.
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)
