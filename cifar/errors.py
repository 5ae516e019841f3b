"""The expected failures, which end a run with one line and an exit status; every other exception is a bug."""

import re

import torch
import torch.distributed as dist

# Messages of plain RuntimeErrors: torch's own class is that of its allocator on GPUs.
_OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator: can't allocate memory|CUDA error: out of memory|Cuda failure [\w ]*'out of memory'|"
    r"MPS backend out of memory"
)

# Errors of gloo are plain RuntimeErrors; those of NCCL and of the store have a class.
_GLOO = re.compile(r"\bgloo/|\bGloo ")
# What gloo, NCCL and the store say to a process whose peer is gone, frozen or hung: the cause is elsewhere.
_PEER_LOST = re.compile(
    r"Connection (closed|reset) by (remote )?peer|Timed out waiting \d+ms|Broken pipe|Connection was likely closed|"
    r"remote process exited|wait timeout after|Socket Timeout|NCCL communicator was aborted|"
    r"collective operation timeout",
    re.IGNORECASE,
)


class UserError(Exception):
    """A wrong flag, file or environment: one line that says what to do, exit status 2.

    Any function may raise it; docstrings mention it only where it says more than the name of the function.
    """

    status = 2


class UsageError(UserError):
    """A UserError that tyro has already explained on this host."""


class LocalError(UserError):
    """A UserError of this rank that the others may not have: one line, from the first rank that has it."""


class TrainingDivergedError(Exception):
    """The loss became NaN or infinite: one line that says where and what to try, exit status 1."""

    status = 1


class StoppedError(Exception):
    """The run stopped because it was asked to: one line that says how to continue, and the exit status."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


def out_of_memory(error: RuntimeError) -> str | None:
    """Return which memory ran out, and how much of it was wanted; None if `error` is about something else."""
    text = str(error)
    if not isinstance(error, torch.OutOfMemoryError) and _OUT_OF_MEMORY.search(text) is None:
        return None
    place = "this host" if "DefaultCPUAllocator" in text else "the GPU"
    wanted = re.search(r"tried to allocate ([\d.]+ \w+)", text, re.IGNORECASE)
    return f"{place} is out of memory" + (f" ({wanted[1]} wanted)" if wanted else "")


def is_network_error(error: Exception) -> bool:
    """Return whether `error` is NCCL's, gloo's or the store's."""
    is_gloos = isinstance(error, RuntimeError) and _GLOO.search(str(error)) is not None
    return is_gloos or isinstance(error, dist.DistError)


def lost_peer(error: Exception) -> str | None:
    """Return what a network error says of a peer that is gone or does not answer; None if it has another cause."""
    text = str(error)
    if (lost := _PEER_LOST.search(text)) is None:
        return None
    # NCCL calls an unreachable peer an exited one; its last line tells which.
    return one_line(text.partition("Last error:")[2]) or lost[0]


def one_line(text: str) -> str:
    """Return `text` without line breaks, and without the stack of C++ functions that torch may have added."""
    return " ".join(text.partition("Exception raised from")[0].split())


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def without_credentials(url: str) -> str:
    """Return a URL as it may be shown and recorded: without user, password and query, which may be a signature."""
    return re.sub(r"(?<=//)[^/?#]*@|[?#].*", "", url)


def count(number: int, noun: str, plural: str = "s") -> str:
    """Return the number with its noun: "1 epoch", "2 epochs"."""
    return f"{number:,} {noun}" + (plural if number != 1 else "")
