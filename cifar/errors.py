"""The expected failures, which end a run with one line and an exit status; every other exception is a bug."""

import re

import torch

# Messages of plain RuntimeErrors: torch's own class is that of its allocator on GPUs.
_OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator: can't allocate memory|CUDA error: out of memory|Cuda failure [\w ]*'out of memory'|"
    r"MPS backend out of memory"
)


class UserError(Exception):
    """A wrong flag, file or environment: one line that says what to do, exit status 2."""

    status = 2


class LocalError(UserError):
    """A UserError of this rank that the others may not have: one line, from the first rank that has it."""


class TrainingDivergedError(Exception):
    """The loss became NaN or infinite: one line that says where and what to try, exit status 1."""

    status = 1


class StoppedError(Exception):
    """The run stopped because it was asked to: one line that says how to continue.

    Attributes:
        status: the exit status; see `Run.stop`.
    """

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


def out_of_memory(error: RuntimeError) -> str | None:
    """Return which memory ran out, and how much of it was wanted; None if `error` is about something else."""
    text = str(error)
    if not isinstance(error, torch.OutOfMemoryError) and _OUT_OF_MEMORY.search(text) is None:
        return None
    numbers = []
    if wanted := re.search(r"tried to allocate ([\d.]+ \wiB|\d+ bytes)", text, re.IGNORECASE):
        size, unit = wanted[1].split()
        numbers.append(f"{int(size) / 2**30:,.2f} GiB wanted" if unit == "bytes" else f"{wanted[1]} wanted")
    if free := re.search(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free", text):
        numbers.append(f"{free[2]} of {free[1]} free")
    place = "this host" if "DefaultCPUAllocator" in text else "the GPU"
    return f"{place} is out of memory" + (f" ({', '.join(numbers)})" if numbers else "")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def without_credentials(url: str) -> str:
    """Return a URL as it may be shown and recorded: without user, password and query, which may be a signature."""
    return re.sub(r"(?<=//)[^/?#]*@|[?#].*", "", url)
