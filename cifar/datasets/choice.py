"""The dataset of a run, the same on all ranks: prepared once on each host, and compared."""

import socket

from cifar.config import TrainConfig
from cifar.datasets import DATASETS, PREPARE
from cifar.datasets.base import Dataset
from cifar.datasets.download import UnavailableError
from cifar.distributed.runtime import Runtime
from cifar.errors import UserError


def choose_dataset(config: TrainConfig, runtime: Runtime) -> tuple[str, Dataset]:
    """Return the name and the content of the dataset to train on. Collective.

    Local rank zero downloads or decodes it if it has to, while the others wait. "auto" is CIFAR-10, or the synthetic
    dataset, on all ranks, if one host can neither find nor download it. A UserError says if a file is corrupt, the
    dataset is not available, or the hosts have different images.
    """
    name = "cifar10" if config.dataset == "auto" else config.dataset
    missing = None
    with runtime.fail_together():
        if runtime.local_rank == 0 and name in PREPARE:
            try:
                PREPARE[name](config)
            except UnavailableError as error:
                if config.dataset != "auto":
                    raise
                missing = str(error)
    if reasons := [reason for reason in runtime.gather(missing) if reason is not None]:
        runtime.print0(f"WARNING: training on the synthetic dataset, not on CIFAR-10: {reasons[0]}")
        name = "synthetic"
    with runtime.fail_together():
        dataset = DATASETS[name](config)
        dataset.check(name)
    _check_same(name, dataset, runtime)
    return name, dataset


def _check_same(name: str, dataset: Dataset, runtime: Runtime) -> None:
    """Check that all ranks have the same images, and name the hosts that do not. Collective."""
    own_host = socket.gethostname() + (f" ({dataset.decoder})" if dataset.decoder else "")
    ranks = runtime.gather((dataset.fingerprint, own_host))
    for split in dataset.fingerprint:
        if len({fingerprint[split] for fingerprint, _ in ranks}) > 1:
            hosts = " and ".join(sorted({f"{fingerprint[split]} on {host}" for fingerprint, host in ranks}))
            raise UserError(f"dataset {name}: the hosts have different {split} images: {hosts}: copy the same files")
