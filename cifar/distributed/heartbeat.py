"""Ranks that stop answering: found within `--timeout`, named, and ended, so that nothing waits for them."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import psutil
from torch.distributed import PrefixStore, Store, TCPStore

_EVERY_SECONDS = 1.0
_LIMIT = 0.75  # of the timeout: the rest is for ending the run within it
_LEFT = b"left"


class Heartbeat:
    """A thread of every rank that counts up in the launcher's store, and watches others do so.

    A collective that misses a rank says only that it timed out, and only where somebody waits in one. A frozen
    process (SIGSTOP, a host that swaps or is cut off) stops counting wherever it is, so that it can be named. Rank
    zero watches all, all watch rank zero: a few messages per rank and second, at any world size.

    What hangs in Python or on a device, but isn't frozen, still counts; for that the collectives have the same timeout.
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
        """Begin to count. Collective.

        Args:
            timeout: seconds without a sign of life after which the run ends.
            address: host and port of the store at which the ranks met.
            store_of_rank_zero: whether that is in rank zero's process, not in the launcher's.
            gather: a value of every rank.
        """
        self._rank, self._timeout = rank, timeout
        self._every = min(_EVERY_SECONDS, timeout / 10)
        self._store_freezes = store_of_rank_zero and rank != 0
        self._watched = [0] if rank else list(range(1, world_size))
        # A store outlives a restart by torchrun, so each start has a name of its own in it.
        name = gather(uuid.uuid4().hex)[0]
        self._store: Store = PrefixStore(
            f"heartbeat/{name}", TCPStore(*address, is_master=False, wait_for_workers=False)
        )
        self._store.set(f"{rank}", "0")
        me = psutil.Process()
        self._processes = gather((socket.gethostname(), me.pid, me.create_time()))
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def stop(self) -> None:
        """Take leave: from now on nobody waits for this rank."""
        self._stopped.set()
        with contextlib.suppress(RuntimeError):  # the store may be gone already
            self._store.set(f"{self._rank}", _LEFT.decode())

    def _run(self) -> None:
        count, looked = 0, time.monotonic()
        seen: dict[int, tuple[bytes, float]] = {}
        while not self._stopped.wait(self._every):
            count += 1
            # A store in a frozen process doesn't answer, and its client waits for it without an end.
            guard = threading.Timer(_LIMIT * self._timeout, self._end, [[0]])
            guard.daemon = True
            if self._store_freezes:
                guard.start()
            try:
                self._store.set(f"{self._rank}", str(count))
                beats = self._store.multi_get([f"{rank}" for rank in self._watched])
                verdict = json.loads(self._store.get("silent")) if self._store.check(["silent"]) else []
            except RuntimeError:
                return  # the store has gone, and with it the launcher or rank zero: no longer anyone's to watch
            finally:
                guard.cancel()
            now = time.monotonic()
            if now - looked > _LIMIT * self._timeout / 2:
                seen = {}  # it was this process that was frozen, and the others weren't seen meanwhile
            looked = now
            for rank, beat in zip(self._watched, beats, strict=True):
                if rank not in seen or seen[rank][0] != beat or beat == _LEFT:
                    seen[rank] = beat, now
            silent = [rank for rank, (_, since) in seen.items() if now - since > _LIMIT * self._timeout] or verdict
            if silent and not self._stopped.is_set():
                if not verdict:
                    with contextlib.suppress(RuntimeError):
                        self._store.set("silent", json.dumps(silent))
                self._end(silent)

    def _end(self, silent: list[int]) -> None:
        """Say who is silent, kill those of this host, and leave: the main thread may be waiting in C for them."""
        if self._rank == min(set(range(len(self._processes))) - set(silent)):
            names = ", ".join(f"rank {r} (process {self._processes[r][1]} on {self._processes[r][0]})" for r in silent)
            print(
                f"error: {names} gave no sign of life for {_LIMIT * self._timeout:.0f} s (--timeout "
                f"{self._timeout:g}): the run ends here; --resume continues it",
                file=sys.stderr,
                flush=True,
            )
        for host, pid, started in (self._processes[rank] for rank in silent):
            with contextlib.suppress(psutil.Error):
                if host == socket.gethostname() and psutil.Process(pid).create_time() == started:
                    psutil.Process(pid).kill()
        sys.stdout.flush()
        os._exit(1)
