"""torchrun with warm restarts: its ranks are forked from a process that has imported the program already.

    OMP_NUM_THREADS=1 python -u launch/warm_torchrun.py [FLAGS OF torchrun] train_ddp.py [FLAGS]

Most of a restart is spent on starting Python, importing torch and reading the images. Here a process of its own, the
fork server, does so once. It has no threads, no CUDA and no connections, which would not survive a fork. The ranks are
children of torchrun's agent in sessions of their own, with the environment, the output and the exit status that they
have under plain torchrun. A rank that cannot be forked starts cold. OMP_NUM_THREADS=1 is what torchrun sets for several
ranks of a host, but torch reads it when it is imported.
"""

import contextlib
import ctypes
import gc
import importlib
import io
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

# What a rank imports until its first step, by the modules that import all of it. A script may have no `__main__` guard.
_MODULES = (
    *("cifar.cli", "cifar.cuda_graph", "cifar.loop", "cifar.predict", "accelerate", "torch._dynamo"),
    *("torch.distributed.algorithms.ddp_comm_hooks.default_hooks", "torch.distributed.tensor"),
    *("torchvision.datasets", "wandb.sdk.launch"),
)
_PR_SET_CHILD_SUBREAPER = 36  # from <linux/prctl.h>
_ANSWER_SECONDS = 10.0  # a fork takes 20 ms

Request = tuple[list[str], dict[str, str], list[str | None]]
"""The script and its flags, the environment, and the files that replace stdout and stderr, or None."""


def preload(flags: list[str]) -> None:
    """Import the program, and load the dataset that `flags` ask for; whatever fails, the ranks report."""
    for name in _MODULES:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # forks would wait for threads that they do not have
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.suppress(Exception, SystemExit),
    ):
        from cifar.cli import parse_args
        from cifar.datasets.choice import preload_dataset

        preload_dataset(parse_args(flags))
    torch.set_num_threads(threads)
    gc.freeze()  # the garbage collector of a rank would copy the pages that they share


def serve(agent: int, requests: Connection) -> Request:
    """Fork a rank for each request, and return the request in that rank."""
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):  # the agent has ended
        requests.send("ready")
        while threading.active_count() == 1:
            request = requests.recv()
            if (parent := os.fork()) != 0:
                if os.waitpid(parent, 0)[1] != 0:
                    requests.send(None)
                continue
            _become_child_of(agent)
            requests.send(os.getpid())
            requests.close()
            return request
    os._exit(0)


def _become_child_of(agent: int) -> None:
    """Fork and exit: Linux gives the new process to its next ancestor that is a "subreaper", as the agent is now."""
    parent = os.getpid()
    if torch.cuda._is_in_bad_fork():  # something has initialized CUDA in the fork server
        os._exit(1)
    if os.fork() != 0:
        os._exit(0)
    os.setsid()
    while os.getppid() == parent:
        time.sleep(0.001)
    if os.getppid() != agent:
        os._exit(1)


def run_script(request: Request) -> None:
    """Run a script in this process as `python -u SCRIPT FLAGS` does."""
    sys.argv[:], environment, outputs = request
    os.environ.update(environment)
    _set_name(f"rank {environment['RANK']}")
    for descriptor, path in enumerate(outputs, start=1):
        if path is not None:
            os.dup2(os.open(path, os.O_WRONLY), descriptor)
    runpy.run_path(sys.argv[0], run_name="__main__")


class Rank:
    """A forked rank: the part of `subprocess.Popen` that torchrun uses."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, or minus the number of the signal that killed the rank, or None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        """Return the exit status once the rank has ended; raise TimeoutExpired after `timeout` seconds."""
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"rank {self.pid}", timeout)
            time.sleep(0.01)
        return status


def fork_ranks(server: Connection) -> None:
    """Let torchrun start ranks by the fork server, once it is ready and as long as it answers; else cold."""
    try:
        server.recv()
    except EOFError:  # it has ended, or there is none on this system
        return
    prctl = ctypes.CDLL(None).prctl
    start_cold = SubprocessHandler._popen

    def fork(arguments: tuple[str, ...], environment: dict[str, str], outputs: list[str | None]) -> int | None:
        try:
            prctl(_PR_SET_CHILD_SUBREAPER, 1)
            server.send((arguments, environment, outputs))
            if server.poll(_ANSWER_SECONDS) and (pid := server.recv()) is not None:
                return pid
        except (OSError, EOFError):
            pass
        finally:
            prctl(_PR_SET_CHILD_SUBREAPER, 0)  # the agent would not wait for any other orphan
        server.close()
        print("warm_torchrun.py: no rank can be forked: they start cold", file=sys.stderr, flush=True)
        return None

    def start(self: SubprocessHandler, args: tuple[str, ...], env: dict[str, str]) -> Any:
        outputs = [file.name if file else None for file in (self._stdout, self._stderr)]
        is_script = args[:2] == (sys.executable, "-u") and not args[2].startswith("-")
        if is_script and not server.closed and (pid := fork(args[2:], env, outputs)) is not None:
            return Rank(pid)
        return start_cold(self, args, env)

    SubprocessHandler._popen = start  # type: ignore[method-assign]


def _set_name(name: str) -> None:
    """Name this process for ps and top, which show the same command line for all forks."""
    Path("/proc/self/comm").write_text(name)


def main() -> None:
    """Start the fork server, and then run torchrun in this process."""
    options = torchrun.parse_args(sys.argv[1:])
    sys.path[0] = str(Path(options.training_script).resolve().parent)
    agent = os.getpid()
    server, requests = multiprocessing.Pipe()
    if sys.platform == "linux" and os.fork() == 0:
        server.close()
        os.setsid()  # a terminal signals the agent, and not this process
        _set_name("fork server")
        preload(options.training_script_args)
        run_script(serve(agent, requests))
        return
    requests.close()
    fork_ranks(server)
    torchrun.main()


if __name__ == "__main__":
    main()
