"""Heartbeats: a rank that stops answering is named and killed, and the run ends within `--timeout`."""

import contextlib
import itertools
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
    number: int
    ended: float  # time.monotonic()
    thread: int  # the one that trains


class Heartbeat:
    """A thread of every rank that increments a counter in the rendezvous store and watches those of other ranks.

    A collective that misses a rank reports a timeout, without a name, and only where some rank waits in one. A frozen
    process (SIGSTOP, swapping, a host cut off) stops counting wherever it is, so it can be named. Rank zero watches all
    ranks, and they watch rank zero: a few messages per rank and second, at any world size.

    A rank that hangs in Python or on the device still counts; before the collectives time out, rank zero says at which
    line of the program every rank is.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        timeout: float,  # seconds within which the run ends after the last heartbeat of some rank
        address: tuple[str, int],  # host and port of the rendezvous store
        store_of_rank_zero: bool,  # whether rank zero's process serves that store, not the launcher's
        gather: Callable[[Any], list[Any]],  # all-gather of a Python value
    ) -> None:
        """Start the thread. Collective."""
        self._rank, self._timeout = rank, timeout
        self._limit = _LIMIT * timeout
        self._interval = min(_INTERVAL_SECONDS, timeout / 10)
        self._store_freezes = store_of_rank_zero and rank != 0
        self._watched = [0] if rank else list(range(1, world_size))
        # The launcher's store outlives a restart, so every start has another prefix.
        prefix = f"heartbeat/{gather(uuid.uuid4().hex)[0]}"
        self._store: Store = PrefixStore(prefix, TCPStore(*address, is_master=False, wait_for_workers=False))
        self._store.set(f"{rank}", "0")
        self._processes = gather((socket.gethostname(), os.getpid(), process_id(os.getpid())))
        self._peers = [r for r, (_, *process) in enumerate(self._processes) if r != rank and is_running(*process)]
        self.peer_is_gone = False  # whether another rank has ended without `stop`; known one or two beats later
        self._last_beats: dict[int, tuple[bytes, float]] = {}  # of a watched rank: its count, and when it changed
        self._last_look = time.monotonic()
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
        for beat in itertools.count(1):
            if self._stop.wait(self._interval):
                return
            # A store in a frozen process does not answer, and its client waits for it forever.
            guard = threading.Timer(self._limit, self._end, kwargs={"silent_ranks": [0]})
            guard.daemon = True
            if self._store_freezes:
                guard.start()
            try:
                silent_ranks = self._exchange_beats(beat)
                if silent_ranks and not self._stop.is_set():
                    with contextlib.suppress(RuntimeError):
                        self._store.set("silent", json.dumps(silent_ranks))
                    self._end(silent_ranks)
            except RuntimeError:
                return  # the store is gone, and with it the launcher or rank zero: nothing left to watch
            finally:
                guard.cancel()

    def _exchange_beats(self, beat: int) -> list[int]:
        """Announce this rank's beat and read the others'; return the ranks that this or another one found silent."""
        # Before the store is read: a rank announces a clean exit first, and then ends.
        ended_peers = [f"{rank}" for rank in self._peers if not is_running(*self._processes[rank][1:])]
        with self._beating:
            if self._stop.is_set():
                return []
            self._store.set(f"{self._rank}", f"{beat}")
        if ended_peers and any(last != _STOPPED for last in self._store.multi_get(ended_peers)):
            self._store.set("gone", "")  # hosts that wait for it cannot see its process
        self.peer_is_gone = self.peer_is_gone or self._store.check(["gone"])
        if (step := self._last_step) and time.monotonic() - step.ended > self._limit:
            self._tell_places(step)
        else:
            self._stalled_beats = 0
        counts = self._store.multi_get([f"{rank}" for rank in self._watched])
        if self._store.check(["silent"]):
            return json.loads(self._store.get("silent"))
        now = time.monotonic()
        if now - self._last_look > self._limit / 2:
            self._last_beats = {}  # this process itself was frozen, and saw no beats meanwhile
        self._last_look = now
        for rank, count in zip(self._watched, counts, strict=True):
            if rank not in self._last_beats or self._last_beats[rank][0] != count or count == _STOPPED:
                self._last_beats[rank] = count, now
        return [rank for rank, (_, since) in self._last_beats.items() if now - since > self._limit]

    def _tell_places(self, step: _Step) -> None:
        """Let rank zero say, once, where each rank is: in the step after `step`, or a step behind or ahead of it."""
        self._store.set(f"place/{self._rank}", f"{_place_of(step.thread)} after step {step.number:,}")
        self._stalled_beats += 1
        if self._rank or self._stalled_beats != 2:  # by the second beat, the others have told their places, too
            return
        places = []
        for rank in range(len(self._processes)):
            key = f"place/{rank}"
            place = self._store.get(key).decode() if self._store.check([key]) else "an unknown place"
            places.append(f"rank {rank} is at {place}")
        self._print(f"WARNING: step {step.number + 1:,} has not ended", "; ".join(places))

    def _end(self, silent_ranks: list[int]) -> None:
        """Name the silent ranks, kill those on this host, and exit: the main thread may wait for them in C."""
        if self._rank == min(set(range(len(self._processes))) - set(silent_ranks)):
            silent = [(rank, *self._processes[rank]) for rank in silent_ranks]
            names = ", ".join(f"rank {rank} (process {pid} on {host})" for rank, host, pid, _ in silent)
            self._print(f"error: {names} sent no heartbeat", "--resume continues it")
        for rank in silent_ranks:
            _, pid, started = self._processes[rank]
            with contextlib.suppress(OSError, psutil.Error):
                if process_id(pid) == started:  # and so it is on this host
                    os.kill(pid, signal.SIGKILL)
        sys.stdout.flush()
        os._exit(1)

    def _print(self, fact: str, more: str) -> None:
        text = f"{fact} for {self._limit:.0f} s (--timeout {self._timeout:g} ends the run): {more}"
        print(text, file=sys.stderr, flush=True)


def _place_of(thread: int) -> str:
    """Return the line of this program, not of a library, at which a thread is."""
    frame = sys._current_frames().get(thread)
    while frame is not None and not Path(frame.f_code.co_filename).is_relative_to(_PROGRAM):
        frame = frame.f_back
    if frame is None:
        return "no line of this program"
    return f"{Path(frame.f_code.co_filename).relative_to(_PROGRAM)}:{frame.f_lineno} ({frame.f_code.co_name})"
