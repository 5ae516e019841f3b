"""torchrun with warm restarts: its ranks are forked from a process that has imported the program and read the dataset.

    OMP_NUM_THREADS=1 python -u launch/warm_torchrun.py [FLAGS OF torchrun] train_ddp.py [FLAGS]

That process, the fork server, has no threads, no CUDA and no connections, which would not survive a fork. The ranks
are children of torchrun's agent, as under plain torchrun; those that cannot be forked start cold. OMP_NUM_THREADS=1 is
what torchrun sets for several ranks of a host, but torch reads it when it is imported.
"""

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import runpy
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import Popen
from typing import Any

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

# All that a rank imports until its first step follows from these. A script itself may have no `__main__` guard.
_MODULES = (
    *("cifar.cli", "cifar.cuda_graph", "cifar.loop", "cifar.predict", "accelerate", "torch._dynamo"),
    *("torch.distributed.algorithms.ddp_comm_hooks.default_hooks", "torch.distributed.tensor"),
    *("torchvision.datasets", "wandb.sdk.launch"),
)
_PR_SET_CHILD_SUBREAPER = 36  # from <linux/prctl.h>
_ANSWER_SECONDS = 10.0  # a fork takes 20 ms


def preload(flags: list[str]) -> None:
    """Import the program, and let `DATASETS` give what it loads for these flags to all ranks."""
    for name in _MODULES:
        with contextlib.suppress(Exception):  # the ranks report it
            importlib.import_module(name)
    from cifar.cli import parse_args
    from cifar.datasets import DATASETS

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # ranks would wait for threads that they do not have
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        contextlib.suppress(Exception, SystemExit),
    ):
        config = parse_args(flags)
        name = "cifar10" if config.dataset == "auto" else config.dataset
        load = DATASETS[name]
        dataset = load(config)
        for images, _ in (dataset.train, dataset.test):  # as cifar.data wants them, so that it makes no copies
            images.data = images.contiguous(memory_format=torch.channels_last)
        assert dataset.fingerprint  # computed here, and kept
        place = (config.data_dir, config.image_size)
        DATASETS[name] = lambda asked: dataset if (asked.data_dir, asked.image_size) == place else load(asked)
    torch.set_num_threads(threads)


def serve(requests: Connection) -> tuple[list[str], dict[str, str]]:
    """Fork a rank for each request, and return the request in that rank, once the agent has adopted it."""
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):  # the agent has ended
        requests.send("ready")
        while threading.active_count() == 1:
            request = requests.recv()
            if (parent := os.fork()) != 0:
                os.waitpid(parent, 0)
                continue
            parent = os.getpid()
            if torch.cuda._is_in_bad_fork() or os.fork() != 0:
                os._exit(0)  # Linux gives the orphan to the next ancestor that is a "subreaper"
            os.setsid()
            while os.getppid() == parent:
                time.sleep(0.001)
            requests.send(os.getpid())
            requests.close()
            return request
    os._exit(0)


def fork_ranks(server: Connection) -> None:
    """Let torchrun start ranks by the fork server, once it is ready and as long as it answers; else cold."""
    prctl = ctypes.CDLL(None).prctl

    class Rank(Popen[bytes]):
        """A process that the fork server starts, if it runs a script with the output of this process."""

        def __init__(self, args: tuple[str, ...], env: dict[str, str], stdout: Any, stderr: Any, **more: Any) -> None:
            is_script = args[:2] == (sys.executable, "-u") and not args[2].startswith("-")
            self._request = (args[2:], env) if is_script and stdout is stderr is None else None
            super().__init__(args=args, env=env, stdout=stdout, stderr=stderr, **more)

        def _execute_child(self, *details: Any) -> None:
            with contextlib.suppress(OSError, EOFError), contextlib.ExitStack() as stack:
                if self._request is not None and not server.closed:
                    stack.callback(prctl, _PR_SET_CHILD_SUBREAPER, 0)  # no other orphan is the agent's
                    prctl(_PR_SET_CHILD_SUBREAPER, 1)
                    server.send(self._request)
                    if server.poll(_ANSWER_SECONDS):
                        self.pid, self._child_created = server.recv(), True
                        return
                    server.close()
            super()._execute_child(*details)

    with contextlib.suppress(EOFError):
        server.recv()
        subprocess_handler.Popen = Rank


def main() -> None:
    """Start the fork server, and run torchrun in this process; in a rank, run the script as `python -u` does."""
    options = torchrun.parse_args(sys.argv[1:])
    server, requests = multiprocessing.Pipe()
    if sys.platform != "linux" or os.fork() != 0:
        requests.close()
        fork_ranks(server)
        torchrun.main()
        return
    server.close()
    os.setsid()  # a terminal signals the agent, and not this process
    sys.path[0] = str(Path(options.training_script).resolve().parent)
    name = Path("/proc/self/comm")  # for ps and top, which show the same command line for all forks
    name.write_text("fork server")
    preload(options.training_script_args)
    sys.argv[:], environment = serve(requests)
    os.environ.update(environment)
    name.write_text(f"rank {environment['RANK']}")
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
