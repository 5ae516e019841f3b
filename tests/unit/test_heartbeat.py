"""Heartbeats of two ranks, forked from this process."""

import json
import os
import re
import signal
import socket
import time
from contextlib import ExitStack, suppress
from datetime import timedelta

import pytest
import torch.distributed as dist

from cifar.distributed.environment import Launch
from cifar.distributed.heartbeat import Heartbeat
from cifar.distributed.preemption import StopRequest
from tests.helpers.forking import fork, free_port, wait

TIMEOUT = 2.0


class Ranks:
    """Two ranks and their store, served by this process as by a launcher, or else by rank zero.

    Neither ever ends its step. SIGUSR2 makes a rank announce a clean exit.
    """

    def __init__(self, store_of_rank_zero=False, in_epoch=None):
        self._in_epoch = in_epoch
        self.port = free_port()
        self.pids = [fork(lambda rank=rank: self._run(rank, store_of_rank_zero)) for rank in range(2)]
        self.store = self._connect(not store_of_rank_zero)
        self.wait_for("ready/0", "ready/1")

    def wait_for(self, *keys):
        self.store.wait(list(keys), timedelta(seconds=30))

    def _connect(self, serve):
        return dist.TCPStore("127.0.0.1", self.port, is_master=serve, wait_for_workers=False)

    def _run(self, rank, store_of_rank_zero):
        store, calls = self._connect(store_of_rank_zero and rank == 0), iter(range(9))

        def gather(value):
            call = next(calls)
            store.set(f"{call}/{rank}", json.dumps(value))
            return [json.loads(store.get(f"{call}/{other}")) for other in range(2)]

        heartbeat = Heartbeat(rank, 2, TIMEOUT, ("127.0.0.1", self.port), store_of_rank_zero, gather)
        if self._in_epoch is not None:
            heartbeat.note_step(7 - rank, last=not self._in_epoch)  # ranks run ahead of their GPUs

        def stop(*_):
            heartbeat.stop()
            store.set(f"stopped/{rank}", "")

        signal.signal(signal.SIGUSR2, stop)
        with StopRequest(Launch(rank=rank, elastic=True), lambda: heartbeat.peer_is_gone):
            store.set(f"ready/{rank}", "")
            while True:
                time.sleep(0.1)

    def kill(self):
        for pid in self.pids:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


@pytest.fixture
def start():
    """Start two ranks in the test itself: pytest's capfd has other files for the setup."""
    with ExitStack() as started:

        def start_ranks(**options):
            ranks = Ranks(**options)
            started.callback(ranks.kill)
            return ranks

        yield start_ranks


@pytest.mark.parametrize(
    ("store_of_rank_zero", "victim"), [(False, 1), (False, 0), (True, 0)], ids=["rank 1", "rank 0", "rank 0 with store"]
)
def test_frozen_rank_is_named_and_killed(start, store_of_rank_zero, victim, capfd):
    ranks = start(store_of_rank_zero=store_of_rank_zero)
    frozen, other = ranks.pids[victim], ranks.pids[1 - victim]
    os.kill(frozen, signal.SIGSTOP)
    began = time.monotonic()
    assert wait(other) == 1
    assert wait(frozen) == -signal.SIGKILL
    assert time.monotonic() - began < TIMEOUT + 1
    lines = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert lines == [
        f"error: rank {victim} (process {frozen} on {socket.gethostname()}) sent no heartbeat for 2 s "
        f"(--timeout 2 ends the run): --resume continues it"
    ]


@pytest.mark.parametrize("in_epoch", [True, False])
def test_ranks_that_hang_in_a_step_are_located(start, in_epoch, capfd):
    """After the last step of an epoch, a test follows, which may take long."""
    start(in_epoch=in_epoch)
    time.sleep(1.5 * TIMEOUT)
    place = r"tests/unit/test_heartbeat.py:\d+ \(_run\)"
    words = r"WARNING: step 8 has not ended for 2 s \(--timeout 2 ends the run\): "
    line = f"{words}rank 0 is at {place} after step 7; rank 1 is at {place} after step 6\n"
    assert re.fullmatch(line if in_epoch else "", capfd.readouterr().err)


def test_rank_learns_from_another_host_that_a_peer_is_gone(start):
    """It cannot see the processes there."""
    ranks = start()
    prefix = json.loads(ranks.store.get("0/0"))  # the first value that rank zero gathered
    dist.PrefixStore(f"heartbeat/{prefix}", ranks.store).set("gone", "")
    os.kill(ranks.pids[0], signal.SIGTERM)
    assert wait(ranks.pids[0]) == 1


def test_rank_that_has_left_in_order_is_not_missed(start):
    ranks = start()
    os.kill(ranks.pids[1], signal.SIGUSR2)
    ranks.wait_for("stopped/1")
    os.kill(ranks.pids[1], signal.SIGSTOP)  # no more heartbeats
    time.sleep(TIMEOUT)
    os.kill(ranks.pids[1], signal.SIGKILL)
    os.kill(ranks.pids[0], signal.SIGTERM)
    time.sleep(1)  # several beats, in which it may end its step
    assert os.waitpid(ranks.pids[0], os.WNOHANG) == (0, 0)
