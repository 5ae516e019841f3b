"""The rendezvous in a store that holds the keys of earlier starts."""

import os
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from cifar.config import TrainConfig
from cifar.distributed import rendezvous
from cifar.distributed.rendezvous import agree_on_prefix
from cifar.distributed.runtime import Runtime
from cifar.errors import UserError
from tests.helpers.forking import fork_ranks
from tests.helpers.processes import rank_variables

TIMEOUT = timedelta(seconds=20)


def start(store, world_size, chance):
    """Return the prefix of each rank; the ranks start at random times."""
    delays = [chance.random() * 0.1 for _ in range(world_size)]

    def begin(rank):
        time.sleep(delays[rank])
        return agree_on_prefix(store, rank, world_size, TIMEOUT)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(begin, range(world_size)))


def test_ranks_agree_on_a_new_prefix_at_every_start():
    store, chance = dist.HashStore(), random.Random(0)
    used = set()
    for world_size in (3, 3, 2, 4, 1, 3, 3, 3):
        (prefix,) = set(start(store, world_size, chance))
        assert prefix not in used
        used.add(prefix)


@pytest.mark.parametrize("last_key", ["prefix", "dead/answer/1", "dead/confirmed"])
def test_start_that_died_halfway_is_ignored(last_key):
    store = dist.HashStore()
    for key, value in {"prefix": "dead", "dead/answer/1": "token", "dead/confirmed": "token"}.items():
        store.set(key, value)
        if key == last_key:
            break
    prefixes = set(start(store, 3, random.Random(1)))
    assert len(prefixes) == 1
    assert "dead" not in prefixes


def test_rank_zero_says_who_is_missing_and_then_says_no_more(monkeypatch, capsys):
    monkeypatch.setattr(rendezvous, "_NOTICE_SECONDS", (0.2, 0.3))
    store = dist.HashStore()
    with ThreadPoolExecutor(4) as pool:
        early = [pool.submit(agree_on_prefix, store, rank, 4, TIMEOUT) for rank in (0, 2)]
        time.sleep(0.7)
        late = [pool.submit(agree_on_prefix, store, rank, 4, TIMEOUT) for rank in (1, 3)]
        assert len({start.result() for start in early + late}) == 1
    first, *more = capsys.readouterr().err.splitlines()
    assert first.startswith("waiting for 2 of 4 processes to start: ranks 1, 3 (")
    time.sleep(0.5)
    assert 1 <= len(more) <= 3
    assert capsys.readouterr().err == ""


@pytest.fixture
def torchruns_store():
    """Return a function that connects to a store which outlives the starts, as torchrun's agent has one."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    return lambda: dist.TCPStore("127.0.0.1", server.port, wait_for_workers=False, timeout=TIMEOUT)


def compare(connect, devices):
    """Return what each rank of a start says to these devices, a host for each; None for nothing."""

    def begin(rank):
        store = connect()
        prefix = agree_on_prefix(store, rank, len(devices), TIMEOUT)
        try:
            rendezvous.compare_devices(dist.PrefixStore(prefix, store), rank, len(devices), devices[rank])
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(devices)) as pool:
        return list(pool.map(begin, range(len(devices))))


def test_hosts_with_and_without_gpus_are_named_on_every_rank_at_every_start(torchruns_store, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: f"host-{threading.current_thread().name[-1]}")
    for devices in ("cuda cuda", "cuda cpu cpu", "cpu cpu cpu", "cpu cuda", "cuda cuda cuda"):
        said = compare(torchruns_store, devices.split())
        assert len(set(said)) == 1
        if len(set(devices.split())) == 1:
            assert said[0] is None
        else:
            assert re.match(
                r"the hosts would train on different devices \((cpu on host-\d, )+cuda on host-\d\): ", said[0]
            )


def test_devices_are_compared_before_the_process_group_is_made(torchruns_store):
    """At a start on hosts with and without a GPU; the next one, on the same store, is on hosts without."""
    port, gpus = torchruns_store().port, True

    def start():
        rank = os.environ["RANK"]
        os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", MASTER_PORT=str(port))
        if not gpus:
            assert Runtime(TrainConfig()).world_size == 2
            return
        if rank == "1":
            torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 1)
        with pytest.raises(UserError, match=r"different devices \(cpu on .*, cuda on "):
            Runtime(TrainConfig())
        assert not dist.is_initialized()

    fork_ranks(2, start)
    gpus = False
    fork_ranks(2, start)


def test_devices_of_one_host_are_not_compared(monkeypatch):
    monkeypatch.setattr(rendezvous, "compare_devices", None)
    fork_ranks(2, lambda: Runtime(TrainConfig()))


def test_first_rank_that_fails_reports(monkeypatch):
    store = dist.HashStore()
    for prefix in ("first start", "second start"):
        monkeypatch.setattr(rendezvous, "_store", dist.PrefixStore(prefix, store))
        with ThreadPoolExecutor(8) as pool:
            assert sorted(pool.map(lambda _: rendezvous.claim_report(), range(8))) == [False] * 7 + [True]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("store", ["gone", "frozen", None])
def test_without_a_store_rank_zero_reports(monkeypatch, store, rank):
    class Store:
        def add(self, key, amount):
            if store == "gone":
                raise dist.DistNetworkError("Connection reset by peer")
            time.sleep(60)

    for name, value in rank_variables(rank, 2).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rendezvous, "_CLAIM_SECONDS", 0.1)
    monkeypatch.setattr(rendezvous, "_store", Store() if store else None)
    assert rendezvous.claim_report() == (rank == 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_missing_rank_times_out(rank):
    with pytest.raises(dist.DistStoreError, match=r"wait timeout after .* not all 2 processes have started"):
        agree_on_prefix(dist.HashStore(), rank, 2, timedelta(seconds=0.2))
