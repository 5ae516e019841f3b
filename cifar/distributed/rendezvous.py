"""A rendezvous at which all ranks learn what differs between them, and which ignores the keys of earlier restarts."""

import contextlib
import hashlib
import json
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import register_rendezvous_handler

import cifar
from cifar.config import TrainConfig, flag
from cifar.distributed.environment import Launch, known_launch
from cifar.distributed.process import host_id
from cifar.errors import UserError

_SCHEME = "restartable"
# The first import of torch on a cold host takes minutes.
_STARTUP_TIMEOUT = timedelta(minutes=10)
_MISTAKE_TIMEOUT = timedelta(minutes=1)  # how long a rank that is about to leave waits to say why
_READ_TIMEOUT = timedelta(seconds=5)
_POLL_SECONDS = 0.05
_NOTICE_SECONDS = 5.0  # until rank zero names those that are missing; then twice as long, and so on
_CLAIM_SECONDS = 2.0

_MAY_DIFFER = ("data_dir", "data_url", "run_dir")  # between hosts; only rank zero uses the last
_first_store: dist.Store | None = None  # kept, as rank zero serves the next one at the same port
_store: dist.Store | None = None  # without the keys of earlier starts
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


def locate(timeout: timedelta = _STARTUP_TIMEOUT) -> Launch:
    """Return this process's place; if the launcher has not said which ranks share a host, they tell each other."""
    launch = Launch.from_environment()
    if not launch.finds_host:
        return launch
    global _first_store
    _first_store = _open_store(launch, timeout)
    keys = [f"host/{rank}" for rank in range(launch.world_size)]
    _first_store.set(keys[launch.rank], host_id())
    return launch.settle([text.decode() for text in _first_store.multi_get(keys)])


def meet(launch: Launch, facts: dict[str, Any], timeout: timedelta) -> dist.Store:
    """Return the store of this start of the processes, after comparing all ranks' `facts`.

    That is before the process group is made: NCCL on one host and gloo on another would wait for each other.
    """
    global _store
    _store = _open_store(launch, timeout)
    compare(_store, launch.rank, launch.world_size, facts)
    return _store


def _open_store(launch: Launch, timeout: timedelta) -> dist.Store:
    """Return torch's store, prefixed for this start of the processes, once all are there.

    torchrun's agent serves the store and restarts failed workers on the same one (torch 2.11 to 2.15,
    pytorch/pytorch#135712), where gloo and NCCL then read the addresses of dead processes: they fail or hang.
    TORCHELASTIC_RESTART_COUNT cannot be the prefix, because it differs between hosts: when a rank of one host is
    killed, the other host's agent restarts its workers for a changed membership, without counting (torch 2.14).
    """
    address, of_rank_zero = launch.store()
    is_server = of_rank_zero and launch.rank == 0
    # As env:// does, but there rank zero waits for the others without a word.
    store = dist.TCPStore(*address, None, is_server, timeout, wait_for_workers=False, multi_tenant=of_rank_zero)
    return dist.PrefixStore(agree_on_prefix(store, launch.rank, launch.world_size, timeout), store)


def compare(store: dist.Store, rank: int, world_size: int, facts: dict[str, Any]) -> None:
    """Compare what the ranks are about to run; a UserError, the same on all of them, names the first difference.

    Args:
        store: of this start.
        facts: of this rank: what has to be the same everywhere, in order, or {"mistake": why it does not run}.
    """
    keys = [f"facts/{other}" for other in range(world_size)]
    store.set(keys[rank], json.dumps({"host": socket.gethostname(), **facts}))
    if rank == 0:
        store.set("difference", _difference([json.loads(text) for text in store.multi_get(keys)]))
    if difference := store.get("difference").decode():
        # Rank zero leaves last, for the store may end with it or its launcher.
        read_keys = [f"read/{other}" for other in range(world_size)]
        store.set(read_keys[rank], "")
        with contextlib.suppress(RuntimeError):
            store.wait(read_keys if rank == 0 else read_keys[:1], _READ_TIMEOUT)
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
                difference = f"{name} is {value} for {places[0]}, but {facts.get(name)} for {place}"
                return f"{difference}: start all of them with the same flags, program, torch version and kind of device"
    return ""


def announce(mistake: str) -> None:
    """Tell the ranks of other hosts of a mistake made before all have met, else they would wait for this one."""
    if _store is not None:
        return
    # On one host, all ranks make it. If the environment is the mistake, there is no way to the others.
    with contextlib.suppress(UserError, RuntimeError, KeyboardInterrupt):
        launch = locate(_MISTAKE_TIMEOUT)
        if launch.world_size > launch.local_world_size:
            meet(launch, {"mistake": mistake}, _MISTAKE_TIMEOUT)


def agree_on_prefix(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Return a prefix that all ranks of this start share and that no earlier start has used.

    Rank zero publishes a new prefix and confirms the tokens with which the others answer it. A rank that read an
    earlier start's prefix does not find its token confirmed there, and reads again. Without an answer of all within
    `timeout`, it raises DistStoreError.
    """
    token, began = uuid.uuid4().hex, time.monotonic()
    answer_keys = [f"{token}/answer/{other}" for other in range(1, world_size)]
    notice_seconds = _NOTICE_SECONDS
    if rank == 0:
        store.set("prefix", token)
    while (seconds := time.monotonic() - began) < timeout.total_seconds():
        if rank != 0:
            prefix = _get(store, "prefix")
            store.set(f"{prefix}/answer/{rank}", token)
            if token in _get(store, f"{prefix}/confirmed").split():
                return prefix
        elif not answer_keys or store.check(answer_keys):
            store.set(f"{token}/confirmed", " ".join(_get(store, key) for key in answer_keys))
            return token
        elif seconds > notice_seconds:
            ranks = [str(other) for other, key in enumerate(answer_keys, start=1) if not store.check([key])]
            missing = f"{len(ranks)} of {world_size} processes to start: rank {', '.join(ranks)}"
            print(f"waiting for {missing} ({seconds:.0f} s)", file=sys.stderr, flush=True)
            notice_seconds *= 2
        time.sleep(_POLL_SECONDS)
    raise dist.DistStoreError(f"not all {world_size} processes have started within {timeout}")


def claim_report() -> bool:
    """Return True on the first rank of this start that calls this: the one to report a failure that others may share.

    If the store does not answer, because the process that serves it is gone or frozen, that is rank zero.
    """
    store = _store
    answers: list[bool] = []

    def ask() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(store is not None and store.add("reports", 1) == 1)

    if store is not None:
        thread = threading.Thread(target=ask, name="claim-report", daemon=True)
        thread.start()
        thread.join(_CLAIM_SECONDS)
    return answers[0] if answers else known_launch().rank == 0


def _get(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""
