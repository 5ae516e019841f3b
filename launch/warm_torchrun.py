"""torchrun with warm restarts: its ranks are forked from a process that has imported the program already.

    python -u launch/warm_torchrun.py [FLAGS OF torchrun] train_ddp.py [FLAGS]

To start Python and to import torch takes most of the time of a restart. Here it is done once, in a process that does
nothing else: it has no threads, no CUDA and no connections that a fork could break. torchrun's agent adopts the ranks,
which are to it, and to themselves, what they are under plain torchrun. Where that is not possible, they start cold.
Set OMP_NUM_THREADS=1 for several ranks on a host, as torchrun does, but before the imports.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

_PR_SET_CHILD_SUBREAPER = 36  # from <linux/prctl.h>
_ANSWER_SECONDS = 10  # a fork takes 20 ms
_POLL_SECONDS = 0.01


def import_program(script: str) -> None:
    """Import what a rank needs until its first step, and what it would import then."""
    sys.path[0] = str(Path(script).resolve().parent)
    import accelerate  # noqa: F401
    import torch._dynamo
    import torch.distributed.tensor
    import torchvision.datasets
    import wandb  # noqa: F401

    import train_ddp  # noqa: F401


class Rank:
    """A forked rank: the part of `subprocess.Popen` that torchrun uses."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, or minus the signal that killed the rank, or None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        """Return the exit status once the rank has ended; raise TimeoutExpired after `timeout` seconds."""
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"rank {self.pid}", timeout)
            time.sleep(_POLL_SECONDS)
        return status


def serve(agent: int, requests: Connection) -> tuple[list[str], dict[str, str], tuple[str | None, ...]]:
    """Fork a rank for each request, and return the request in that rank.

    The rank's parent is a process that exits at once, so that the rank's parent is then the agent, its "subreaper".
    """
    os.setsid()  # a terminal signals the agent and not this process
    _set_name("fork server")
    gc.freeze()  # the collector would copy the pages of all that it visits
    while True:
        try:
            request = requests.recv()
        except (EOFError, KeyboardInterrupt):
            os._exit(0)
        if (parent := os.fork()) != 0:
            os.waitpid(parent, 0)
            continue
        parent = os.getpid()
        if os.fork() != 0:
            os._exit(0)
        os.setsid()
        while os.getppid() == parent:
            time.sleep(0.001)
        if os.getppid() != agent:
            os._exit(1)
        requests.send(os.getpid())
        requests.close()
        return request


def become_rank(args: list[str], environment: dict[str, str], outputs: tuple[str | None, ...]) -> None:
    """Run the script `args` in this process as `python -u` would."""
    os.environ.update(environment)
    _set_name(f"rank {environment['RANK']}")
    for descriptor, path in enumerate(outputs, start=1):
        if path is not None:
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    sys.argv[:] = args
    runpy.run_path(args[0], run_name="__main__")


def fork_ranks(server: Connection) -> None:
    """Let torchrun fork the ranks that it would start as `python -u SCRIPT`."""
    libc = ctypes.CDLL(None)
    start_cold = SubprocessHandler._popen

    def start(self: SubprocessHandler, args: tuple[str, ...], environment: dict[str, str]) -> Any:
        if args[:2] == (sys.executable, "-u") and not args[2].startswith("-"):
            with contextlib.suppress(OSError, EOFError):
                libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
                server.send((args[2:], environment, [out and out.name for out in (self._stdout, self._stderr)]))
                if server.poll(_ANSWER_SECONDS):
                    pid = server.recv()
                    return Rank(pid)
        return start_cold(self, args, environment)

    SubprocessHandler._popen = start


def _set_name(name: str) -> None:
    """Name this process for ps and top, which show the same command line for all forks."""
    Path("/proc/self/comm").write_text(name)


def main() -> None:
    import_program(torchrun.parse_args(sys.argv[1:]).training_script)
    agent = os.getpid()
    ours, theirs = multiprocessing.Pipe()
    if os.fork() == 0:
        ours.close()
        become_rank(*serve(agent, theirs))
        return
    theirs.close()
    fork_ranks(ours)
    torchrun.main()


if __name__ == "__main__":
    main()
