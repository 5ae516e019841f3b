"""train_ddp.py, which crashes at the signal CRASH and hangs at HOLD: see `tests.helpers.soak`."""

import ctypes
import signal

import train_ddp
from cifar.command import exit_on_error

CRASH, HOLD = signal.SIGUSR2, signal.SIGVTALRM

if __name__ == "__main__":
    signal.signal(CRASH, lambda *_: ctypes.string_at(0))  # a segmentation fault
    signal.signal(HOLD, lambda *_: ctypes.PyDLL(None).sleep(3600))  # keeps the GIL, as a broken extension module may
    with exit_on_error("fragile.py"):
        train_ddp.main()
