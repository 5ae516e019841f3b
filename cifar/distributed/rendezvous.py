"""A rendezvous that ignores keys which earlier restarts left in torchrun's store."""

import contextlib
import itertools
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from cifar.distributed.environment import Launch, is_rank_zero
from cifar.errors import UserError

_SCHEME = "restartable"
# The first import of torch on a cold host takes minutes.
_STARTUP_TIMEOUT = timedelta(minutes=10)
_POLL_SECONDS = 0.05
_NOTICE_SECONDS = (5, 25, 60)  # between two words about who is missing
_CLAIM_SECONDS = 2.0

_store: dist.Store | None = None  # of this start, without the keys of earlier ones


def init_method(device: str) -> str:
    """Return the URL of this rendezvous for a process that trains on this type of device."""
    return f"{_SCHEME}://{device}"


def _rendezvous(url: str, timeout: timedelta, **kwargs: Any) -> Iterator[tuple[dist.Store, int, int]]:
    """Yield torch's `env://` rendezvous, its store prefixed for this start of the processes.

    torchrun's agent serves the store and restarts failed workers on the same one (torch 2.11 to 2.15,
    pytorch/pytorch#135712), where gloo and NCCL then read the addresses of dead processes: they fail or hang.
    TORCHELASTIC_RESTART_COUNT cannot be the prefix, because it differs between hosts: when a rank of one host is
    killed, the other host's agent restarts its workers for a changed membership, without counting (torch 2.14).
    """
    timeout = max(timeout, _STARTUP_TIMEOUT)
    launch = Launch.from_environment()
    (host, port), by_rank_zero = launch.store()
    awaited = "the other processes" if by_rank_zero and launch.rank == 0 else "the store of rank zero"
    with _say_what_is_awaited(lambda: f"{awaited} at {host}:{port}", quiet=launch.local_rank != 0):
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    global _store
    _store = dist.PrefixStore(agree_on_prefix(store, rank, world_size, timeout), store)
    if launch.world_size > launch.local_world_size:
        compare_devices(_store, rank, world_size, urlsplit(url).netloc)
    yield _store, rank, world_size


register_rendezvous_handler(_SCHEME, _rendezvous)


def agree_on_prefix(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Return a prefix that all ranks of this start share and that no earlier start has used.

    Rank zero publishes a new prefix and confirms the tokens with which the others answer it. A rank that read an
    earlier start's prefix does not find its token confirmed there, and reads again.

    Raises:
        DistStoreError: some rank did not answer within `timeout`.
    """
    token, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    answers = {other: f"{token}/answer/{other}" for other in range(1, world_size)}

    def missing() -> str:
        ranks = [str(other) for other, answer in answers.items() if not store.check([answer])]
        return f"{len(ranks)} of {world_size} processes to start: rank{'s'[: len(ranks) - 1]} {', '.join(ranks)}"

    if rank == 0:
        store.set("prefix", token)
    with _say_what_is_awaited(missing, quiet=rank != 0):
        while time.monotonic() < deadline:
            if rank != 0:
                prefix = _get(store, "prefix")
                store.set(f"{prefix}/answer/{rank}", token)
                if token in _get(store, f"{prefix}/confirmed").split():
                    return prefix
            elif not answers or store.check(list(answers.values())):
                store.set(f"{token}/confirmed", " ".join(_get(store, answer) for answer in answers.values()))
                return token
            time.sleep(_POLL_SECONDS)
    raise dist.DistStoreError(f"wait timeout after {timeout}: not all {world_size} processes have started")


def compare_devices(store: dist.Store, rank: int, world_size: int, device: str) -> None:
    """Check that all ranks train on the same type of device: NCCL on one host and gloo on another wait for each other.

    Args:
        store: of this start.

    Raises:
        UserError: they do not; raised on all ranks, names the hosts.
    """
    store.set(f"device/{rank}", f"{device} on {socket.gethostname()}")
    if rank == 0:
        found = {place.decode() for place in store.multi_get([f"device/{other}" for other in range(world_size)])}
        alike = len({place.split()[0] for place in found}) == 1
        store.set("devices", "" if alike else ", ".join(sorted(found)))
    if differing := store.get("devices").decode():
        raise UserError(
            f"the hosts would train on different devices ({differing}): use --device cpu on all of them, or start only "
            f"those where PyTorch finds a GPU"
        )


def claim_report() -> bool:
    """Return True on the first rank of this start that calls this: the one to report a failure that others may share.

    If the store does not answer, because the process that serves it is gone or frozen, that is rank zero.
    """
    answers: list[bool] = []

    def ask(store: dist.Store) -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(store.add("reports", 1) == 1)

    if _store is not None:
        thread = threading.Thread(target=ask, args=(_store,), name="claim-report", daemon=True)
        thread.start()
        thread.join(_CLAIM_SECONDS)
    return answers[0] if answers else is_rank_zero()


@contextlib.contextmanager
def _say_what_is_awaited(what: Callable[[], str], quiet: bool) -> Iterator[None]:
    """Print what a block waits for, after a few seconds and then now and then, unless `quiet`."""
    done, began = threading.Event(), time.monotonic()

    def speak() -> None:
        for pause in itertools.chain(_NOTICE_SECONDS, itertools.repeat(_NOTICE_SECONDS[-1])):
            if done.wait(pause):
                return
            seconds = time.monotonic() - began
            print(f"waiting for {what()} ({seconds:.0f} s)", file=sys.stderr, flush=True)

    if not quiet:
        threading.Thread(target=speak, name="rendezvous-notice", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _get(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""
