"""train_ddp.py as a script that crashes or hangs when it gets a signal: see `tests.helpers.soak`."""

import ctypes
import signal

import train_ddp
from cifar.command import exit_on_error

CRASH, HOLD = signal.SIGUSR2, signal.SIGVTALRM


def hold(*_: object) -> None:
    """Sleep without releasing the GIL, as a broken extension module may: no other thread of this process runs."""
    ctypes.PyDLL(None).sleep(3600)


if __name__ == "__main__":
    signal.signal(CRASH, lambda *_: ctypes.string_at(0))  # a segmentation fault
    signal.signal(HOLD, hold)
    with exit_on_error("fragile.py"):
        train_ddp.main()
