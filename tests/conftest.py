"""Fixtures: the real dataset, one process, small data, and no W&B account."""

import os

# Before torch is imported: the threads of several test processes would compete for the cores, and losses are exact only
# for one number of threads.
os.environ["OMP_NUM_THREADS"] = "1"

import sys
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the directory that holds the real cifar-10-batches-py."""
    data_dir = Path(os.environ.get("CIFAR_DATA_DIR", ROOT / "data"))
    if not (data_dir / "cifar-10-batches-py").is_dir():
        pytest.skip(f"no CIFAR-10 in {data_dir}: set CIFAR_DATA_DIR to the directory of cifar-10-batches-py")
    return data_dir


@pytest.fixture(scope="session")
def runtime():
    """Return the runtime of one process on the CPU, in fp32."""
    from cifar.config import TrainConfig
    from cifar.distributed.runtime import Runtime

    return Runtime(TrainConfig(device="cpu"))


@pytest.fixture(scope="session")
def synthetic(runtime):
    """Return 2,000 training and 1,000 test images of the synthetic dataset, as Data."""
    from cifar.config import TrainConfig
    from cifar.data import load_data
    from tests.helpers.comparing import shrink_synthetic

    with pytest.MonkeyPatch.context() as patched:
        shrink_synthetic(patched, 2_000, 1_000)
        return load_data(TrainConfig(dataset="synthetic"), runtime)


@pytest.fixture
def hosts():
    """Return two hosts on this machine."""
    from tests.helpers.hosts import Hosts, why_not

    if (missing := why_not()) is not None:
        pytest.skip(missing)
    with Hosts() as two:
        yield two


@pytest.fixture
def server():
    """Return an HTTP server."""
    from tests.helpers.http_server import Server

    with Server() as running:
        yield running


@pytest.fixture
def tiny_runs(monkeypatch):
    """Make runs on the synthetic dataset take milliseconds."""
    from tests.helpers.comparing import make_runs_tiny

    make_runs_tiny(monkeypatch)


@pytest.fixture(autouse=True)
def _no_wandb_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the W&B account of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", os.devnull)


@pytest.fixture
def wandb(monkeypatch):
    """Return W&B as in a new process, without an account and without a server."""
    import wandb

    from tests.helpers.wandb_server import NOWHERE

    for hooked in ("exit", "excepthook"):  # W&B wraps them each time it is set up
        monkeypatch.setattr(sys, hooked, getattr(sys, hooked))
    for name, value in NOWHERE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_DATA_DIR", os.devnull)
    wandb.teardown()
    yield wandb
    wandb.teardown()
