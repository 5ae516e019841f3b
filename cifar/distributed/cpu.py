"""Settings that speed up training on a CPU."""

import contextlib
import ctypes
from collections.abc import Iterator

import torch

SMALL_BATCH = 4  # images up to which native convolutions are faster than oneDNN's

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from <malloc.h>


def keep_freed_memory() -> None:
    """Keep freed memory in this process instead of returning it to the kernel (glibc only; else a no-op).

    By default glibc unmaps every large tensor when it is freed, so the next one faults in each of its pages again: 40 %
    of the time of a `speed94` step on two CPU cores. Peak memory stays the same.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


@contextlib.contextmanager
def native_convolutions() -> Iterator[None]:
    """Run a block with torch's native convolutions instead of oneDNN's.

    oneDNN reorders its inputs first, which pays off from 8 images on. With the tutorial's 4 images, a step of the Net
    takes 0.9 ms with native convolutions and 1.1 ms with oneDNN's (two cores, torch 2.14).
    """
    # torch.backends.mkldnn.flags does the same, but warns about Intel GPUs.
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)
