"""The rendezvous in a store that holds the keys of earlier starts."""

import dataclasses
import os
import random
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cifar.config import TrainConfig
from cifar.distributed import rendezvous
from cifar.distributed.device import resolve
from cifar.distributed.environment import Launch
from cifar.distributed.rendezvous import agree_on_prefix
from cifar.distributed.runtime import Runtime
from cifar.errors import UserError
from tests.helpers.forking import fork_ranks
from tests.helpers.processes import rank_variables

TIMEOUT = timedelta(seconds=20)


def start(store, world_size):
    """Return the prefix that the ranks of a start agree on; they start at random times."""

    def begin(rank):
        time.sleep(random.random() * 0.1)
        return agree_on_prefix(store, rank, world_size, TIMEOUT)

    with ThreadPoolExecutor(world_size) as pool:
        (prefix,) = set(pool.map(begin, range(world_size)))
    return prefix


def test_ranks_agree_on_a_new_prefix_at_every_start():
    store, starts = dist.HashStore(), (3, 3, 2, 4, 1, 3)
    assert len({start(store, world_size) for world_size in starts}) == len(starts)


@pytest.mark.parametrize("keys", [1, 2, 3])
def test_start_that_died_halfway_is_ignored(keys):
    store = dist.HashStore()
    for key, value in [("prefix", "dead"), ("dead/answer/1", "token"), ("dead/confirmed", "token")][:keys]:
        store.set(key, value)
    assert start(store, 3) != "dead"


def test_rank_zero_says_who_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(rendezvous, "_NOTICE_SECONDS", 0.2)
    store = dist.HashStore()
    with ThreadPoolExecutor(4) as pool:
        early = [pool.submit(agree_on_prefix, store, rank, 4, TIMEOUT) for rank in (0, 2)]
        time.sleep(0.7)
        late = [pool.submit(agree_on_prefix, store, rank, 4, TIMEOUT) for rank in (1, 3)]
        assert len({start.result() for start in early + late}) == 1
    words = "waiting for 2 of 4 processes to start: rank 1, 3 ("  # after 0.2 s, and after 0.4
    assert [line[: len(words)] for line in capsys.readouterr().err.splitlines()] == [words, words]


@pytest.fixture
def torchruns_store():
    """Return a function that connects to a store which outlives the starts, as torchrun's agent has one."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    return lambda: dist.TCPStore("127.0.0.1", server.port, wait_for_workers=False, timeout=TIMEOUT)


def compare(connect, everyone):
    """Return what each rank of a start says to these facts, a host for each; None for nothing."""

    def begin(rank):
        store = connect()
        prefix = agree_on_prefix(store, rank, len(everyone), TIMEOUT)
        try:
            rendezvous.compare(dist.PrefixStore(prefix, store), rank, len(everyone), everyone[rank])
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(everyone)) as pool:
        return list(pool.map(begin, range(len(everyone))))


CPU, GPU = {"the device": "cpu", "--seed": 0}, {"the device": "cuda", "--seed": 0}


def test_first_difference_is_named_on_every_rank_at_every_start(torchruns_store, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: f"host-{threading.current_thread().name[-1]}")
    for everyone, expected in (
        ([CPU, CPU, CPU], "None"),
        ([CPU, GPU | {"--seed": 1}], r"the device is cpu for rank 0 on host host-\d, but cuda for rank 1 on host host"),
        ([CPU, CPU, CPU | {"--seed": 1}], r"--seed is 0 for rank 0 .*, but 1 for rank 2 on host host-\d: start all of"),
        ([{"the program": "a", "old": 1}, {"the program": "b", "new": 1}], "the program is a .*, but b "),
        ([GPU, GPU], "None"),
        ([CPU, GPU, {"mistake": "no such file"}], r"no such file \[rank 2 on host host-\d\]$"),
    ):
        (said,) = set(compare(torchruns_store, everyone))
        assert re.match(expected, str(said))


def on_two_hosts(port, start):
    """Do `start(rank)` in two ranks of torchrun, a host for each, whose store outlives them."""

    def begin():
        rank = int(os.environ["RANK"])
        os.environ.update(rank_variables(rank, 2, port, alone=True), TORCHELASTIC_USE_AGENT_STORE="True")
        start(rank)

    fork_ranks(2, begin)


def test_ranks_are_compared_before_the_process_group_is_made(torchruns_store):
    """At a start on hosts with and without a GPU; the next one, on the same store, is on hosts without."""
    port = torchruns_store().port

    def differ(rank):
        if rank == 1:
            torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 1)
        with pytest.raises(UserError, match=r"^the device is cpu for rank 0 .* but cuda for rank 1 "):
            Runtime(resolve(TrainConfig(), Launch.from_environment()))
        assert not dist.is_initialized()

    on_two_hosts(port, differ)
    on_two_hosts(port, lambda _: Runtime(resolve(TrainConfig(), Launch.from_environment())))


def test_all_of_the_configuration_is_compared_but_the_directories():
    config = TrainConfig(device="cpu")
    same = rendezvous.init_method(config)
    for fields in ({"lr": 0.2}, {"global_batch_size": 8}, {"evaluate": Path("x")}, {"precision": "bf16"}):
        assert rendezvous.init_method(dataclasses.replace(config, **fields)) != same
    for fields in ({"data_dir": Path("a")}, {"run_dir": Path("/home/a/run")}, {"data_url": "https://host/a.zip"}):
        assert rendezvous.init_method(dataclasses.replace(config, **fields)) == same


def test_program_is_the_package_and_the_script_that_runs(monkeypatch, tmp_path):
    (tmp_path / "cifar").mkdir()
    monkeypatch.setattr("cifar.__file__", str(tmp_path / "cifar" / "__init__.py"))
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "mine.py"), raising=False)
    programs = [rendezvous._program()]
    for name in ("train_ddp.py", "mine.py", "cifar/data.py", "cifar/notes.txt"):
        (tmp_path / name).write_text(f"{name} = 1")
        programs.append(rendezvous._program())
    assert len(set(programs)) == 4
    assert programs[-1] == programs[-2], "notes are no program"
    monkeypatch.delattr(sys.modules["__main__"], "__file__")  # as in a notebook
    assert rendezvous._program() not in programs


def with_torchs_four_variables(start):
    """Do `start(rank)` in two ranks that an engine starts."""

    def begin():
        del os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]
        start(int(os.environ["RANK"]))

    fork_ranks(2, begin)


def test_ranks_with_torchs_four_variables_find_their_places_and_join():
    def start(rank):
        launch = rendezvous.locate(TIMEOUT)
        assert launch == Launch(rank, rank, 2, 2, finds_host=True)
        for _ in range(2):  # the second run of this process meets again
            with Runtime(resolve(TrainConfig(device="cpu"), launch)) as runtime:
                assert runtime.gather(runtime.accelerator.local_process_index) == [0, 1]

    with_torchs_four_variables(start)


def test_announcement_that_nobody_hears_does_not_wait(monkeypatch):
    monkeypatch.setattr(os, "environ", rank_variables(1, 2, port=1, alone=True))
    monkeypatch.setattr(rendezvous, "_store", None)
    monkeypatch.setattr(rendezvous, "_MISTAKE_TIMEOUT", timedelta(seconds=0.2))
    began = time.monotonic()
    rendezvous.announce("no such file")
    assert time.monotonic() - began < 10


def test_first_rank_that_fails_reports(monkeypatch):
    store = dist.HashStore()
    for prefix in ("first start", "second start"):
        monkeypatch.setattr(rendezvous, "_store", dist.PrefixStore(prefix, store))
        with ThreadPoolExecutor(8) as pool:
            assert sorted(pool.map(lambda _: rendezvous.claim_report(), range(8))) == [False] * 7 + [True]


@pytest.mark.parametrize("store", ["gone", "frozen", None])
def test_without_a_store_rank_zero_reports(monkeypatch, store):
    class Store:
        def add(self, key, amount):
            if store == "gone":
                raise dist.DistNetworkError("Connection reset by peer")
            time.sleep(60)

    monkeypatch.setattr(rendezvous, "_CLAIM_SECONDS", 0.1)
    monkeypatch.setattr(rendezvous, "_store", Store() if store else None)
    for rank in (0, 1):
        monkeypatch.setattr(os, "environ", rank_variables(rank, 2))
        assert rendezvous.claim_report() == (rank == 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_missing_rank_times_out(rank):
    with pytest.raises(dist.DistStoreError, match=r"^not all 2 processes have started within 0:00:00.2"):
        agree_on_prefix(dist.HashStore(), rank, 2, timedelta(seconds=0.2))
