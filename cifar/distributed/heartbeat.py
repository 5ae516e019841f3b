"""Heartbeats: a rank that stops answering is named and killed, and the run ends within `--timeout`."""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from torch.distributed import PrefixStore, Store, TCPStore

from cifar.distributed.process import is_running, process_id

_INTERVAL_SECONDS = 1.0
_LIMIT = 0.75  # of the timeout: the rest is for ending the run within it
_STOPPED = b"stopped"
_PROGRAM = Path(__file__).resolve().parents[2]


class _Step(NamedTuple):
    """A training step: its number, when it ended, and the thread that trains."""

    number: int
    ended: float  # time.monotonic()
    thread: int


class Heartbeat:
    """A thread of every rank that increments a counter in the rendezvous store and watches those of other ranks.

    A collective that misses a rank reports a timeout, without a name, and only where some rank waits in one. A frozen
    process (SIGSTOP, swapping, a host cut off) stops counting wherever it is, so it can be named. Rank zero watches all
    ranks, and they watch rank zero: a few messages per rank and second, at any world size.

    A rank that hangs in Python or on the device still counts; the timeout of the collectives covers that. Before it,
    rank zero says at which line of the program every rank is.

    Attributes:
        peer_is_gone: whether another rank has ended without `stop`; on its host known a beat later, on others two.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        timeout: float,
        address: tuple[str, int],
        store_of_rank_zero: bool,
        gather: Callable[[Any], list[Any]],
    ) -> None:
        """Start the thread. Collective.

        Args:
            timeout: seconds within which the run ends after the last heartbeat of some rank.
            address: host and port of the rendezvous store.
            store_of_rank_zero: whether rank zero's process serves that store, not the launcher's.
            gather: all-gather of a Python value.
        """
        self._rank, self._timeout = rank, timeout
        self._interval = min(_INTERVAL_SECONDS, timeout / 10)
        self._store_freezes = store_of_rank_zero and rank != 0
        self._watched = [0] if rank else list(range(1, world_size))
        # The launcher's store outlives a restart, so every start uses a prefix of its own.
        prefix = f"heartbeat/{gather(uuid.uuid4().hex)[0]}"
        self._store: Store = PrefixStore(prefix, TCPStore(*address, is_master=False, wait_for_workers=False))
        self._store.set(f"{rank}", "0")
        self._processes = gather((socket.gethostname(), os.getpid(), process_id(os.getpid())))
        self._peers = [r for r, (_, *process) in enumerate(self._processes) if r != rank and is_running(*process)]
        self.peer_is_gone = False
        self._last_step: _Step | None = None
        self._stalled_beats = 0
        self._stop, self._beating = threading.Event(), threading.Lock()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def stop(self) -> None:
        """Announce a clean exit, so that the other ranks stop watching this one."""
        self._stop.set()
        with self._beating, contextlib.suppress(RuntimeError):  # the store may be gone already
            self._store.set(f"{self._rank}", _STOPPED.decode())

    def note_step(self, step: int, last: bool) -> None:
        """Note that the training step `step` has ended; after the `last` one of an epoch, no other follows at once."""
        self._last_step = None if last else _Step(step, time.monotonic(), threading.get_ident())

    def _run(self) -> None:
        limit = _LIMIT * self._timeout
        count, last_look = 0, time.monotonic()
        seen: dict[int, tuple[bytes, float]] = {}  # rank: its last beat, and when it changed
        while not self._stop.wait(self._interval):
            count += 1
            # A store in a frozen process does not answer, and its client waits for it forever.
            guard = threading.Timer(limit, self._end, [[0]])
            guard.daemon = True
            if self._store_freezes:
                guard.start()
            # Before the store is read: a rank announces a clean exit first, and then ends.
            ended = [f"{rank}" for rank in self._peers if not is_running(*self._processes[rank][1:])]
            try:
                with self._beating:
                    if self._stop.is_set():
                        return
                    self._store.set(f"{self._rank}", str(count))
                if ended and any(last != _STOPPED for last in self._store.multi_get(ended)):
                    self._store.set("gone", "")  # hosts that wait for it cannot see its process
                self.peer_is_gone = self.peer_is_gone or self._store.check(["gone"])
                if (step := self._last_step) and time.monotonic() - step.ended > limit:
                    self._tell_places(step)
                else:
                    self._stalled_beats = 0
                beats = self._store.multi_get([f"{rank}" for rank in self._watched])
                reported = json.loads(self._store.get("silent")) if self._store.check(["silent"]) else []
            except RuntimeError:
                return  # the store is gone, and with it the launcher or rank zero: nothing left to watch
            finally:
                guard.cancel()
            now = time.monotonic()
            if now - last_look > limit / 2:
                seen = {}  # this process itself was frozen, and saw no beats meanwhile
            last_look = now
            for rank, beat in zip(self._watched, beats, strict=True):
                if rank not in seen or seen[rank][0] != beat or beat == _STOPPED:
                    seen[rank] = beat, now
            silent = [rank for rank, (_, since) in seen.items() if now - since > limit] or reported
            if silent and not self._stop.is_set():
                if not reported:
                    with contextlib.suppress(RuntimeError):
                        self._store.set("silent", json.dumps(silent))
                self._end(silent)

    def _tell_places(self, step: "_Step") -> None:
        """Let rank zero say, once, where each rank is: in the step after `step`, or a step behind or ahead of it."""
        self._store.set(f"place/{self._rank}", f"{_place(step.thread)} after step {step.number:,}")
        self._stalled_beats += 1
        if self._rank or self._stalled_beats != 2:  # by the second beat, the others have told their places, too
            return
        keys = {rank: f"place/{rank}" for rank in range(len(self._processes))}
        places = {rank: self._store.get(keys[rank]).decode() for rank in keys if self._store.check([keys[rank]])}
        where = "; ".join(f"rank {rank} is at {places.get(rank, 'an unknown place')}" for rank in keys)
        print(
            f"WARNING: step {step.number + 1:,} has not ended for {_LIMIT * self._timeout:.0f} s (--timeout "
            f"{self._timeout:g} ends the run): {where}",
            file=sys.stderr,
            flush=True,
        )

    def _end(self, silent: list[int]) -> None:
        """Name the silent ranks, kill those on this host, and exit: the main thread may wait for them in C."""
        if self._rank == min(set(range(len(self._processes))) - set(silent)):
            names = ", ".join(f"rank {r} (process {self._processes[r][1]} on {self._processes[r][0]})" for r in silent)
            print(
                f"error: {names} sent no heartbeat for {_LIMIT * self._timeout:.0f} s (--timeout "
                f"{self._timeout:g}): the run ends here; --resume continues it",
                file=sys.stderr,
                flush=True,
            )
        for _, pid, started in (self._processes[rank] for rank in silent):
            with contextlib.suppress(OSError, psutil.Error):
                if process_id(pid) == started:  # and so it is on this host
                    os.kill(pid, signal.SIGKILL)
        sys.stdout.flush()
        os._exit(1)


def _place(thread: int) -> str:
    """Return the line of this program, not of a library, at which a thread is."""
    frame = sys._current_frames().get(thread)
    while frame is not None and not Path(frame.f_code.co_filename).is_relative_to(_PROGRAM):
        frame = frame.f_back
    if frame is None:
        return "no line of this program"
    return f"{Path(frame.f_code.co_filename).relative_to(_PROGRAM)}:{frame.f_lineno} ({frame.f_code.co_name})"
