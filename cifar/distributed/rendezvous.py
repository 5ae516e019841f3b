"""Where the processes of one start meet, apart from those that torchrun started before them."""

import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

METHOD = "round://"
# The first import of torch on a cold host takes minutes.
_PATIENCE = timedelta(minutes=10)
_POLL_SECONDS = 0.05


def _meet(url: str, timeout: timedelta, **kwargs: Any) -> Iterator[tuple[dist.Store, int, int]]:
    """torch's rendezvous by the launcher's environment, in a part of its store that no earlier start has used.

    torchrun's own process holds the store and, after a failure, starts its workers again on the same one (torch 2.11
    to 2.15: pytorch/pytorch#135712). There, gloo and NCCL read the addresses of processes that are gone, and fail or
    wait for good. No number that the workers are given tells one start from the next on all hosts alike, so they
    agree on a name.
    """
    store, rank, world_size = next(rendezvous("env://", timeout=max(timeout, _PATIENCE)))
    name = name_of_round(store, rank, world_size, max(timeout, _PATIENCE))
    yield dist.PrefixStore(f"round/{name}", store), rank, world_size


register_rendezvous_handler("round", _meet)


def name_of_round(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that all ranks of this start know, in a `store` that may be full of what earlier ones left.

    Rank zero calls out a new name until each rank has answered it, then says whose answers it took. A rank that read
    the name of an earlier start doesn't find its own answer there, and reads again.

    Raises:
        DistStoreError: some rank didn't answer within `timeout`.
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()

    def pause() -> None:
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"wait timeout after {timeout}: not all {world_size} processes have started")
        time.sleep(_POLL_SECONDS)

    if rank == 0:
        store.set("name", mine)
        answers = []
        for other in range(1, world_size):
            while not (answer := _read(store, f"answer/{other}")).startswith(mine):
                pause()
            answers.append(answer)
        store.set(f"taken/{mine}", " ".join(answers))
        return mine
    while True:
        name = _read(store, "name")
        store.set(f"answer/{rank}", f"{name}-{mine}")
        if f"{name}-{mine}" in _read(store, f"taken/{name}").split():
            return name
        pause()


def _read(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""
