"""Preemption: a stop signal is noticed wherever the main thread is, and all ranks stop after the same step."""

import itertools
import multiprocessing
import os
import random
import signal
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from cifar.distributed import preemption
from cifar.distributed.environment import Launch
from cifar.distributed.preemption import STOP_SIGNALS, StopAgreement, StopRequest
from tests.helpers.forking import fork, wait


def wait_until(reached):
    deadline = time.monotonic() + 10
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert reached()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_first_signal_and_its_echo_are_only_noted(number):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup themselves
    handlers = [signal.getsignal(stop) for stop in STOP_SIGNALS]
    with StopRequest(Launch()) as request:
        os.kill(os.getpid(), number)
        wait_until(lambda: request.name is not None)
        assert request.name == number.name
        os.kill(os.getpid(), number)
        time.sleep(0.1)
    assert [signal.getsignal(stop) for stop in STOP_SIGNALS] == handlers
    assert signal.set_wakeup_fd(-1) == -1


def test_terminal_that_closes_does_not_stop_a_run_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(Launch()) as request:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(lambda: request.name is not None)
            assert request.name == "SIGTERM"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_training_in_another_thread_leaves_signals_to_the_program():
    before = [signal.getsignal(stop) for stop in STOP_SIGNALS]

    def train():
        with StopRequest(Launch()):
            assert [signal.getsignal(stop) for stop in STOP_SIGNALS] == before

    with ThreadPoolExecutor(1) as pool:
        pool.submit(train).result()


def hang(launch):
    """Return the process ID of a copy that waits in C, where no Python handler runs."""
    ready, write = os.pipe()

    def work():
        with StopRequest(launch):
            os.write(write, b".")
            dist.HashStore().wait(["never"], timedelta(seconds=60))

    pid = fork(work)
    os.read(ready, 1)
    time.sleep(0.1)
    return pid


def test_second_signal_quits_at_once_even_in_c(monkeypatch, capfd):
    monkeypatch.setattr(preemption, "_ECHO_SECONDS", 0.3)
    pid = hang(Launch())
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.5)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.kill(pid, signal.SIGINT)
    assert wait(pid) == 128 + signal.SIGINT
    assert capfd.readouterr().err == "SIGINT after SIGTERM: quitting at once, without a checkpoint\n"


def test_endless_step_is_announced_and_left_before_torchrun_kills_it(monkeypatch, capfd):
    monkeypatch.setattr(preemption, "_NOTICE_SECONDS", 0.1)
    monkeypatch.setattr(preemption, "_GRACE_SECONDS", 1.2)
    pid = hang(Launch(elastic=True))
    os.kill(pid, signal.SIGTERM)
    assert wait(pid) == 1
    first, last = capfd.readouterr().err.splitlines()
    assert first == "SIGTERM: stopping once this step or test has ended"
    assert last == "SIGTERM, but the step did not end within 1.2 s: quitting"


@pytest.mark.parametrize("in_notebook", [False, True])
def test_torchrun_is_asked_to_stop_but_no_notebook_is(in_notebook):
    def rank():
        os.environ["TORCHELASTIC_ERROR_FILE"] = "error.json"
        StopRequest(Launch(elastic=True)).pass_on()

    def agent():
        if in_notebook:
            process = multiprocessing.get_context("fork").Process(target=rank)
            process.start()
            process.join()
        else:
            wait(fork(rank))

    assert wait(fork(agent)) == (0 if in_notebook else -signal.SIGTERM)


class Ranks:
    """Ranks in threads, with an all-reduce that waits for all of them."""

    def __init__(self, world_size):
        self.world_size = world_size
        self.requests = [StopRequest(Launch()) for _ in range(world_size)]
        self.votes = defaultdict(list)

    def agreement(self, rank):
        """Return the StopAgreement of one rank."""
        calls = itertools.count()

        def start_max(tensor):
            votes = self.votes[next(calls)]
            votes.append(tensor.tolist())

            def wait():
                wait_until(lambda: len(votes) == self.world_size)
                tensor.copy_(torch.tensor(votes).amax(0))

            return SimpleNamespace(wait=wait)

        return StopAgreement(SimpleNamespace(world_size=self.world_size, start_max=start_max), self.requests[rank])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_ranks_stop_after_the_same_step(world_size):
    """A single one stops after its current step, and votes with nobody."""
    chance, ranks = random.Random(world_size), Ranks(world_size)
    asked, at = chance.randrange(world_size), chance.randint(1, 300)
    pauses = [chance.choice([0, 0, 0.0005]) for _ in range(world_size)]

    def train(rank):
        agreement = ranks.agreement(rank)
        for step in range(1, 2000):
            time.sleep(pauses[rank])
            if rank == asked and step == at:
                ranks.requests[rank].name = "SIGTERM"
            if agreement.after_step():
                return step
        return None

    with ThreadPoolExecutor(world_size) as pool:
        (stopped,) = set(pool.map(train, range(world_size)))
    if world_size == 1:
        assert (stopped, ranks.votes) == (at, {})
    else:
        assert at < stopped <= at + 2 * preemption._VOTE_STEPS + 2


@pytest.mark.parametrize(("seconds", "interval"), [(0.0001, 100), (0.01, 25), (1.0, 1)])
def test_vote_every_quarter_second_or_hundred_steps(monkeypatch, seconds, interval):
    now = [0.0]
    monkeypatch.setattr(preemption.time, "perf_counter", lambda: now[0])
    ranks = Ranks(2)
    agreements = [ranks.agreement(rank) for rank in range(2)]
    for _ in range(20 * interval):
        now[0] += seconds
        for agreement in agreements:
            agreement.after_step()
    assert len(ranks.votes) == pytest.approx(20, abs=3)
