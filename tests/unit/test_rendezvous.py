"""The ranks of one start find one another in a store that is full of what earlier starts left."""

import random
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from cifar.distributed.rendezvous import name_of_round

PATIENCE = timedelta(seconds=20)


def meet(store, world_size, chance):
    """The name that each rank of a start arrives at; they begin at random moments."""
    names = [""] * world_size
    delays = [chance.random() * 0.1 for _ in names]

    def begin(rank):
        time.sleep(delays[rank])
        names[rank] = name_of_round(store, rank, world_size, PATIENCE)

    threads = [threading.Thread(target=begin, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


def test_every_start_has_one_name_of_its_own():
    store, chance = dist.HashStore(), random.Random(0)
    seen = set()
    for world_size in (3, 3, 2, 4, 1, 3, 3, 3):
        (name,) = set(meet(store, world_size, chance))
        assert name not in seen
        seen.add(name)


@pytest.mark.parametrize("left", ["name", "answer", "taken"])
def test_a_start_that_died_in_the_middle_misleads_nobody(left):
    store = dist.HashStore()
    store.set("name", "dead")
    if left != "name":
        store.set("answer/1", "dead-mine")
    if left == "taken":
        store.set("taken/dead", "dead-mine")
    names = set(meet(store, 3, random.Random(1)))
    assert len(names) == 1
    assert "dead" not in names


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_comes_is_missed(rank):
    with pytest.raises(dist.DistStoreError, match="not all 2 processes have started"):
        name_of_round(dist.HashStore(), rank, 2, timedelta(seconds=0.2))
