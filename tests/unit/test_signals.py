"""Being asked to stop: noticed wherever the main thread is, and agreed on by all ranks."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from cifar.distributed import preemption as signals
from cifar.distributed.environment import Launch
from cifar.distributed.preemption import STOP_SIGNALS, StopAgreement, StopRequest
from tests.helpers.processes import clean_environment


def wait_for(reached):
    deadline = time.monotonic() + 10
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert reached()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_first_signal_is_remembered_and_nothing_else_happens(number):
    before = [signal.getsignal(stop) for stop in STOP_SIGNALS]
    with StopRequest(Launch()) as request:
        assert request.name is None
        os.kill(os.getpid(), number)
        wait_for(lambda: request.name is not None)
        assert request.name == number.name
        os.kill(os.getpid(), number)  # an echo of the first one
        time.sleep(0.1)
    assert [signal.getsignal(stop) for stop in STOP_SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


STUCK = """
import os, sys, threading, time
from cifar.distributed import preemption as signals
from cifar.distributed.environment import Launch
signals._ECHO_SECONDS = 0.3
signals._GRACE_SECONDS = float(sys.argv[2])
if os.fork():  # this one plays torchrun
    if sys.argv[3] == "stays":
        os.wait()
    time.sleep(0.5)
    os._exit(0)
import torch.distributed as dist
from datetime import timedelta
launch = Launch(elastic=sys.argv[1] == "elastic")
with signals.StopRequest(launch) as request:
    print(os.getpid(), flush=True)
    if sys.argv[3] == "leaves":
        while request.name is None:
            time.sleep(0.05)
        print(request.name, flush=True)
        sys.exit()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    store.get("never")  # in C, where no Python handler runs
"""


def start(*arguments):
    command = [sys.executable, "-c", STUCK, *arguments]
    return subprocess.Popen(command, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_second_signal_quits_at_once_even_in_the_middle_of_c_code():
    process = start("alone", "60", "stays")
    pid = int(process.stdout.readline())
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.6)
    assert not gone(pid)
    os.kill(pid, signal.SIGINT)
    wait_for(lambda: gone(pid))
    assert process.communicate(timeout=10)[1] == "SIGINT after SIGTERM: quitting at once, without a checkpoint\n"


def test_a_step_without_an_end_is_left_before_torchrun_kills_it():
    process = start("elastic", "0.5", "stays")
    pid = int(process.stdout.readline())
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: gone(pid))
    assert process.communicate(timeout=10)[1] == "SIGTERM, but no end of the step within 0.5 s: quitting\n"


def test_the_end_of_torchrun_is_a_wish_to_stop():
    process = start("elastic", "60", "leaves")
    assert process.communicate(timeout=60)[0].splitlines()[1] == "the end of torchrun"


class Ranks:
    """Several ranks in threads, with an all_reduce that waits for all of them, as a real one does."""

    def __init__(self, world_size):
        self.world_size = world_size
        self.requests = [StopRequest(Launch()) for _ in range(world_size)]
        self.calls = 0
        self._lock = threading.Lock()
        self._votes: dict[int, list] = {}

    def rank(self, own):
        ranks, started = self, iter(range(10**6))

        class PendingAllReduce:
            def __init__(self, exchange):
                self.exchange = exchange

            def result(self):
                deadline = time.monotonic() + 10
                while len(ranks._votes[self.exchange]) < ranks.world_size:
                    assert time.monotonic() < deadline, "some rank never began this exchange"
                    time.sleep(0.001)
                return [max(column) for column in zip(*ranks._votes[self.exchange], strict=True)]

        class Runtime:
            world_size = ranks.world_size

            def start_max(self, tensor):
                exchange = next(started)
                with ranks._lock:
                    ranks.calls += 1
                    ranks._votes.setdefault(exchange, []).append(tensor.tolist())
                return PendingAllReduce(exchange)

        return StopAgreement(Runtime(), ranks.requests[own])


@pytest.mark.parametrize("seed", range(5))
def test_all_ranks_stop_after_the_same_step(seed):
    chance = random.Random(seed)
    ranks = Ranks(3)
    asked, at = chance.randrange(3), chance.randint(1, 300)
    pauses = [chance.choice([0, 0, 0.0005]) for _ in range(3)]
    stopped = [0] * 3

    def train(own):
        agreement = ranks.rank(own)
        for step in range(1, 2000):
            time.sleep(pauses[own])
            if own == asked and step == at:
                ranks.requests[own].name = "SIGTERM"
            if agreement.after_step():
                stopped[own] = step
                return

    threads = [threading.Thread(target=train, args=(own,)) for own in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(stopped)) == 1
    assert at < stopped[0] <= at + 2 * signals._EXCHANGE_STEPS + 2


@pytest.mark.parametrize(("seconds", "every"), [(0.0001, 100), (0.01, 25), (0.1, 2), (1.0, 1)])
def test_ranks_ask_one_another_four_times_a_second_and_at_least_every_hundred_steps(monkeypatch, seconds, every):
    now = [0.0]
    monkeypatch.setattr(signals.time, "perf_counter", lambda: now[0])
    ranks = Ranks(2)
    agreements = [ranks.rank(own) for own in range(2)]
    steps = 20 * every
    for _ in range(steps):
        now[0] += seconds
        for agreement in agreements:
            agreement.after_step()
    assert ranks.calls / 2 == pytest.approx(steps / every, abs=3)


def test_one_process_stops_after_the_step_at_hand():
    ranks = Ranks(1)
    agreement = ranks.rank(0)
    assert not agreement.after_step()
    ranks.requests[0].name = "SIGTERM"
    assert agreement.after_step()
    assert ranks.calls == 0
