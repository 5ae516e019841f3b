"""What makes training on a CPU fast, besides the layout of the images."""

import contextlib
import ctypes
from collections.abc import Iterator

import torch

SMALL_BATCH = 4  # up to which torch's plain convolutions are faster than oneDNN's

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # mallopt's names for them, in <malloc.h>


def keep_freed_memory() -> None:
    """On Linux with glibc, have this process keep the memory that it frees; elsewhere, do nothing.

    By default glibc hands every large tensor back to the kernel, and takes the next one from there, page by page:
    on two CPU cores, that was 40 % of the time of a `speed94` step. The peak of what is in use stays the same.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)


@contextlib.contextmanager
def native_convolutions() -> Iterator[None]:
    """A block in which convolutions are torch's own, which don't rearrange the data first, instead of oneDNN's.

    oneDNN's are made for batches that fill them: for the tutorial's 4 images, a step of the Net takes 0.9 ms with the
    plain ones and 1.1 ms with oneDNN's (two cores, torch 2.14); from 8 images on, oneDNN's win.
    """
    # torch.backends.mkldnn.flags does the same, and with a warning about Intel GPUs.
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)
