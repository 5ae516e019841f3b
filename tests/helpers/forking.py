"""Copies of the test's own process, to be killed: they have torch loaded already, and so start in milliseconds."""

import os
import signal
import warnings
from collections.abc import Callable


def fork(work: Callable[[], object]) -> int:
    """The process id of a copy of this process that does `work` and ends, with status 0 unless `work` raises.

    Only this thread goes on in the copy: `work` must not train, nor wait for any other thread.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12's, of what the docstring says
        child = os.fork()
    if child:
        return child
    try:
        # Should it hang, or outlive a test that failed, it ends by itself.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)
        work()
        os._exit(0)
    finally:
        os._exit(1)  # whatever was raised: no second pytest must go on from here


def wait(child: int) -> int:
    """How `child` ended: its exit status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
