"""Fork this process, which has loaded torch: a copy starts in milliseconds."""

import os
import signal
import socket
import warnings
from collections.abc import Callable

from tests.helpers.processes import rank_variables


def fork(work: Callable[[], object], seconds: int = 60) -> int:
    """Return the process ID of a copy that does `work` and exits, with status 0 unless `work` raises.

    After `seconds`, it is killed. Only the calling thread survives in it: after training here, `work` must not train.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks with threads
        child = os.fork()
    if child:
        return child
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        work()
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(1)  # a second pytest must not continue from here


def wait(child: int) -> int:
    """Return the exit status of `child`, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def free_port() -> int:
    """Return a port of this host that no process listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def fork_ranks(world_size: int, work: Callable[[], object]) -> None:
    """Do `work` in `world_size` ranks, copies of this process with a launcher's variables; raise if one fails."""
    # Loaded once for all: every rank would take 3 seconds for what DDP and the optimizers import when they are made.
    import torch._dynamo
    import torch.distributed.tensor  # noqa: F401

    port = free_port()

    def start(rank: int) -> None:
        if world_size > 1:
            os.environ.update(rank_variables(rank, world_size, port))
        work()

    running = {fork(lambda rank=rank: start(rank), seconds=240) for rank in range(world_size)}  # type: ignore[misc]
    failed = False
    while running:
        child, status = os.wait()
        running.discard(child)
        if status and not failed:
            failed = True
            for other in running:
                os.kill(other, signal.SIGKILL)
    if failed:
        raise RuntimeError(f"one of {world_size} ranks failed")
