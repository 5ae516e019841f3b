"""What the tests share: where the real data is, one runtime in this process, and real runs in others."""

import os

# Before torch is imported: two busily waiting threads in each of several test processes would starve one another.
os.environ["OMP_NUM_THREADS"] = "1"

import sys
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder that holds the real cifar-10-batches-py."""
    folder = Path(os.environ.get("CIFAR_DATA_DIR", ROOT / "data"))
    if not (folder / "cifar-10-batches-py").is_dir():
        pytest.skip(f"no CIFAR-10 in {folder}: set CIFAR_DATA_DIR to the folder that holds cifar-10-batches-py")
    return folder


@pytest.fixture(scope="session")
def runtime():
    """One process on the CPU, in fp32."""
    from cifar.config import TrainConfig
    from cifar.distributed.runtime import Runtime

    return Runtime(TrainConfig(device="cpu"))


@pytest.fixture(scope="session")
def synthetic(runtime):
    """The stand-in, on the CPU."""
    from cifar.config import TrainConfig
    from cifar.data import load_data

    return load_data(TrainConfig(dataset="synthetic"), runtime)


@pytest.fixture(autouse=True)
def _no_wandb_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reaches the W&B account of whoever runs it."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", os.devnull)


@pytest.fixture
def wandb(monkeypatch):
    """W&B as in a new process, without an account and without a server."""
    import wandb

    from tests.helpers.wandb_server import NOWHERE

    for hooked in ("exit", "excepthook"):  # W&B wraps them anew in each of its lives
        monkeypatch.setattr(sys, hooked, getattr(sys, hooked))
    for name, value in NOWHERE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_DATA_DIR", os.devnull)
    wandb.teardown()
    yield wandb
    wandb.teardown()
