"""Preemption: notice a stop signal at once, and stop all ranks after the same step."""

import contextlib
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cifar.distributed.environment import Launch
from cifar.distributed.process import is_running
from cifar.distributed.runtime import Runtime
from cifar.errors import StoppedError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# A terminal or scheduler signals the ranks directly, and torchrun forwards it again: that copy is not a second signal.
_ECHO_SECONDS = 1.0
_NOTICE_SECONDS = 3.0  # a user who sees nothing happen would ask again
# torchrun kills its workers 30 seconds after it passed a signal on; exit before that, with a message.
_GRACE_SECONDS = 20.0
# The interval of votes on whether to stop: whichever is shorter.
_VOTE_SECONDS = 0.25
_VOTE_STEPS = 100


class StopRequest:
    """A context manager that notices stop signals and the death of torchrun.

    Stop signals are SIGTERM, SIGINT, SIGUSR1 and, unless nohup had it ignored, SIGHUP of a terminal that closes.
    The first signal is remembered. A second one within a second counts as its echo; a later one quits at once.

    Python runs signal handlers in the main thread, between two bytecodes; but that thread may wait in C for a rank that
    is gone. So a thread reads the signal numbers from a pipe (`signal.set_wakeup_fd`), into which Python's C handler
    writes them in any case.
    """

    def __init__(self, launch: Launch, cannot_end: Callable[[], bool] = lambda: False) -> None:
        """Prepare for the signals that follow.

        Args:
            cannot_end: whether the step waits for a process that is gone, and nothing is left to save. Asked in another
                thread, after a stop signal, until it is true. (NCCL's kernels wait forever for a rank that was killed,
                where gloo sees a closed connection: from NCCL's documentation; not yet seen with two GPUs.)
        """
        self.name: str | None = None  # of the first request, such as "SIGTERM"
        self._cannot_end = cannot_end
        self._is_main = launch.rank == 0
        self._agent = launch.agent()
        self._grace = _GRACE_SECONDS if launch.elastic else float("inf")
        self._requested_at = 0.0  # time.monotonic()
        self._noticed = False  # whether the user knows that the step takes long

    def __enter__(self) -> "StopRequest":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._handlers: dict[int, Any] = {}
        # Python lets only the main thread handle signals: a program that trains in another handles them itself.
        if threading.current_thread() is threading.main_thread():
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            # Only signals with a Python handler are written to the pipe.
            for number in STOP_SIGNALS:
                if not (nohup and number == signal.SIGHUP):
                    self._handlers[number] = signal.signal(number, lambda *_: None)
        self._thread = threading.Thread(target=self._watch, name="stop-request", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._handlers:
            signal.set_wakeup_fd(self._wakeup)
            # A failure that torchrun has noticed already need not wait for its signal; see `command`.
            if self.name == "SIGTERM" and kind not in (None, StoppedError):
                self._handlers[signal.SIGTERM] = signal.SIG_IGN
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._write)  # ends the thread
        self._thread.join()
        os.close(self._read)

    def pass_on(self) -> None:
        """Ask torchrun to stop, too, instead of restarting its ranks; but not a notebook that has forked this one."""
        if self._agent is not None and is_running(*self._agent) and multiprocessing.parent_process() is None:
            with contextlib.suppress(OSError):
                os.kill(self._agent[0], signal.SIGTERM)

    def _watch(self) -> None:
        while True:
            ready, _, _ = select.select([self._read], [], [], 0.5)
            numbers = os.read(self._read, 64) if ready else b""
            if ready and not numbers:  # closed
                return
            for number in numbers:
                if number in STOP_SIGNALS:
                    self._request(signal.Signals(number).name, 128 + number)
            if self._agent is not None and not is_running(*self._agent):
                # torchrun died, by SIGKILL or a signal that it does not handle: nothing else will stop this process.
                self._agent = None
                self._request("the end of torchrun", 1)
            if self.name is not None:
                self._hurry(time.monotonic() - self._requested_at)

    def _request(self, name: str, status: int) -> None:
        if self.name is None:
            self._requested_at = time.monotonic()
            self.name = name
        elif time.monotonic() - self._requested_at > _ECHO_SECONDS:
            self._quit(f"{name} after {self.name}: quitting at once, without a checkpoint", status)

    def _hurry(self, seconds: float) -> None:
        """Tell the user, and quit in the end, if the step goes on for `seconds` after the request."""
        if seconds > _NOTICE_SECONDS and not self._noticed:
            self._noticed = True
            self._print(f"{self.name}: stopping once this step or test has ended")
        if self._cannot_end():
            self._quit(f"{self.name}, and another process of this run is gone: quitting", 1)
        if seconds > self._grace:
            self._quit(f"{self.name}, but the step did not end within {self._grace:g} s: quitting", 1)

    def _quit(self, reason: str, status: int) -> None:
        self._print(reason)
        os._exit(status)

    def _print(self, text: str) -> None:
        if self._is_main:
            print(text, file=sys.stderr, flush=True)


class StopAgreement:
    """Let all ranks stop after the same step once one of them was asked to.

    The ranks vote by an asynchronous all-reduce of two numbers over gloo, on the CPU. It starts after one step and is
    read several steps later, when it has long completed: nothing waits for it, and the device is not involved.
    (accelerate's `check_trigger` reduces a tensor on the device and reads it at once, which blocks in every step.)

    The second number is the mean time of a step. From the slowest rank's, all compute the same number of steps to the
    next vote, about a quarter of a second. With 2 processes on 2 CPU cores, a vote costs 0.2 % of a step of 3 ms.
    """

    def __init__(self, runtime: Runtime, request: StopRequest) -> None:
        self._runtime, self._request = runtime, request
        self._vote = torch.zeros(2, dtype=torch.float64)
        self._vote_in_flight: Any = None
        self._interval, self._steps = 1, 0
        self._began = time.perf_counter()

    def after_step(self) -> bool:
        """Return whether to stop now, the same on all ranks. Collective: every rank calls it after every step."""
        if self._runtime.world_size == 1:
            return self._request.name is not None
        self._steps += 1
        if self._steps < self._interval:
            return False
        stop = False
        if self._vote_in_flight is not None:
            self._vote_in_flight.wait()
            requested, slowest = self._vote.tolist()
            stop = requested > 0
            self._interval = max(1, min(_VOTE_STEPS, round(_VOTE_SECONDS / slowest)))
        now = time.perf_counter()
        vote = [float(self._request.name is not None), (now - self._began) / self._steps]
        self._vote = torch.tensor(vote, dtype=torch.float64)
        self._vote_in_flight = self._runtime.start_max(self._vote)
        self._began, self._steps = now, 0
        return stop

    def stopped(self, place: str, run_dir: Path) -> StoppedError:
        """Return the error that ends the run, the same on all ranks. Collective."""
        launch = self._runtime.launch
        requests = self._runtime.gather((launch.host, self._request.name))
        names = sorted({name for _, name in requests if name is not None})
        leaving_hosts = {host for host, name in requests if name is not None}
        text = f"Stopped by {', '.join(names)} {place}"
        if launch.restarts_left > 0 and leaving_hosts != {host for host, _ in requests}:
            text += f" on host {', '.join(map(str, sorted(leaving_hosts)))}; torchrun restarts the others"
        else:
            text += f"; to continue: --resume {run_dir}"
        number = getattr(signal, names[0], None)  # None: the end of torchrun
        return StoppedError(text, status=128 + number if number else 1)

    def leave_together(self) -> None:
        """Wait until rank zero has closed the records, for torchrun ends a host's ranks as soon as one has left.

        With restarts left, torchrun starts them again: right on a host that was not asked to stop, while on another one
        a rank has to ask torchrun, too. SIGTERM to all ranks of a host may be torchrun's own, before a restart.
        """
        launch = self._runtime.launch
        with contextlib.suppress(RuntimeError):  # a rank has been killed meanwhile
            requests = self._runtime.gather((launch.host, self._request.name))
            names = {name for host, name in requests if host == launch.host}
            if launch.restarts_left > 0 and launch.local_rank == 0 and names not in ({None}, {"SIGTERM"}):
                self._request.pass_on()
