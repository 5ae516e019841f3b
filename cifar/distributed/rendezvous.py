"""A rendezvous at which all ranks learn what differs between them, and which ignores the keys of earlier restarts."""

import contextlib
import hashlib
import itertools
import json
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

import cifar
from cifar.config import TrainConfig, flag
from cifar.distributed.environment import Launch, is_rank_zero
from cifar.errors import UserError

_SCHEME = "restartable"
# The first import of torch on a cold host takes minutes.
_STARTUP_TIMEOUT = timedelta(minutes=10)
_MISTAKE_TIMEOUT = timedelta(minutes=1)  # how long a rank that is about to leave waits to say why
_READ_TIMEOUT = timedelta(seconds=5)
_POLL_SECONDS = 0.05
_NOTICE_SECONDS = (5, 25, 60)  # between two words about who is missing
_CLAIM_SECONDS = 2.0

_MAY_DIFFER = ("data_dir", "data_url", "run_dir")  # between hosts; only rank zero uses the last
_REMEDIES = {
    "the program": "copy the same train_ddp.py and cifar/ to every host",
    "the torch version": "install the same version on every host",
    "the device": "use --device cpu on all of them, or start only hosts where PyTorch finds a GPU",
    "the precision": "use --precision fp32 or bf16",
}

_store: dist.Store | None = None  # of this start, without the keys of earlier ones
_joined = False


def init_method(config: TrainConfig) -> str:
    """Return the URL of this rendezvous for a process with this configuration, its device and precision resolved."""
    facts = {"the program": _program(), "the torch version": torch.__version__.partition("+")[0]}
    facts |= {"the device": config.device, "the precision": config.precision, "--recipe": config.recipe}
    facts |= {flag(name): value for name, value in config.to_json().items() if name not in _MAY_DIFFER}
    return f"{_SCHEME}://{quote(json.dumps(facts), safe='')}"


def _program() -> str:
    """Return a digest of this program: the package, train_ddp.py and the script that runs."""
    package = Path(cifar.__file__).resolve().parent
    scripts = [package.parent / "train_ddp.py", Path(getattr(sys.modules["__main__"], "__file__", None) or "")]
    digest = hashlib.sha256()
    for path in (*sorted(package.rglob("*.py")), *scripts):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _rendezvous(url: str, timeout: timedelta, **kwargs: Any) -> Iterator[tuple[dist.Store, int, int]]:
    """Yield the store of this start, the rank and the world size, once all ranks are known to run the same."""
    launch = Launch.from_environment()
    store = meet(launch, json.loads(unquote(urlsplit(url).netloc)), max(timeout, _STARTUP_TIMEOUT))
    global _joined
    _joined = True
    yield store, launch.rank, launch.world_size


register_rendezvous_handler(_SCHEME, _rendezvous)


def has_joined() -> bool:
    """Return whether all ranks have met and run the same, so that each of them knows of a common mistake."""
    return _joined


def meet(launch: Launch, facts: dict[str, Any], timeout: timedelta) -> dist.Store:
    """Return torch's `env://` store, prefixed for this start of the processes, after comparing all ranks' `facts`.

    That is before the process group is made: NCCL on one host and gloo on another would wait for each other.

    torchrun's agent serves the store and restarts failed workers on the same one (torch 2.11 to 2.15,
    pytorch/pytorch#135712), where gloo and NCCL then read the addresses of dead processes: they fail or hang.
    TORCHELASTIC_RESTART_COUNT cannot be the prefix, because it differs between hosts: when a rank of one host is
    killed, the other host's agent restarts its workers for a changed membership, without counting (torch 2.14).

    Raises:
        UserError: some rank differs, or has made a mistake; the same on all ranks.
    """
    (host, port), by_rank_zero = launch.store()
    awaited = "the other processes" if by_rank_zero and launch.rank == 0 else "the store of rank zero"
    with _say_what_is_awaited(lambda: f"{awaited} at {host}:{port}", quiet=launch.local_rank != 0):
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    global _store
    _store = dist.PrefixStore(agree_on_prefix(store, rank, world_size, timeout), store)
    compare(_store, rank, world_size, facts)
    return _store


def compare(store: dist.Store, rank: int, world_size: int, facts: dict[str, Any]) -> None:
    """Compare what the ranks are about to run.

    Args:
        store: of this start.
        facts: of this rank: what has to be the same everywhere, in order, or {"mistake": why it does not run}.

    Raises:
        UserError: the first mistake or difference from rank zero; the same on all ranks.
    """
    ranks = [f"facts/{other}" for other in range(world_size)]
    store.set(ranks[rank], json.dumps({"host": socket.gethostname(), **facts}))
    if rank == 0:
        store.set("difference", _difference([json.loads(text) for text in store.multi_get(ranks)]))
    if difference := store.get("difference").decode():
        # The store may end with rank zero or its launcher.
        reads = [f"read/{other}" for other in range(world_size)]
        store.set(reads[rank], "")
        with contextlib.suppress(RuntimeError):
            store.wait(reads if rank == 0 else reads[:1], _READ_TIMEOUT)
        raise UserError(difference)


def _difference(ranks: list[dict[str, Any]]) -> str:
    """Return the first mistake of a rank, or the first fact in which one differs from rank zero, or nothing."""
    places = [f"rank {rank} on host {facts.pop('host')}" for rank, facts in enumerate(ranks)]
    for place, facts in zip(places, ranks, strict=True):
        if "mistake" in facts:
            return f"{facts['mistake']} [{place}]"
    for name, value in ranks[0].items():
        for place, facts in zip(places, ranks, strict=True):
            if facts.get(name) != value:
                remedy = _REMEDIES.get(name, "start all of them with the same flags")
                return f"{name} is {value} for {places[0]}, but {facts.get(name)} for {place}: {remedy}"
    return ""


def announce(mistake: str) -> None:
    """Tell the ranks of other hosts of a mistake made before all have met, else they would wait for this one."""
    if _store is not None:
        return
    # On one host, all ranks make it. If the environment is the mistake, there is no way to the others.
    with contextlib.suppress(UserError, RuntimeError, KeyboardInterrupt):
        launch = Launch.from_environment()
        if launch.world_size > launch.local_world_size:
            meet(launch, {"mistake": mistake}, _MISTAKE_TIMEOUT)


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
        noun = "rank" if len(ranks) == 1 else "ranks"
        return f"{len(ranks)} of {world_size} processes to start: {noun} {', '.join(ranks)}"

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
    raise dist.DistStoreError(f"not all {world_size} processes have started within {timeout}")


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
