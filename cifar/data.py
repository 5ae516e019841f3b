"""CIFAR-10, or its stand-in, as tensors that live on the device, behind DistributedSampler loaders."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from cifar.augment import CropFlip
from cifar.batch_plan import BatchPlan
from cifar.datasets.cifar10 import prepare_cifar10
from cifar.config import TrainConfig
from cifar.datasets import DATASETS
from cifar.distributed.runtime import Runtime
from cifar.augment import derive_seed

EVAL_BATCH_SIZE = 1000
CHUNK = 1024  # images that are gathered, augmented and normalized at once: for small batches that costs most


class DeviceImages(Dataset[tuple[Tensor, Tensor]]):
    """Images and labels on one device, read by whole batches.

    Attributes:
        images: uint8 [n, 3, 32, 32], channels-last in memory.
        labels: int64 [n].
        augment: applied to every batch before normalization, or None.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, device: torch.device, layout: torch.memory_format = torch.channels_last
    ) -> None:
        self.images = images.to(device, memory_format=torch.channels_last)
        self.labels = labels.to(device)
        self.augment: CropFlip | None = None
        self._layout = layout

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images, float32 [batch, 3, 32, 32] in [-1, 1], and labels, int64 [batch], of `indices`, int64 [batch]."""
        # index_select copies whole images where [indices] would gather bytes one by one, but minds no memory format.
        images = self.images.permute(0, 2, 3, 1).index_select(0, indices).permute(0, 3, 1, 2)
        if self.augment is not None:
            images = self.augment(images, indices)
        return normalize(images.contiguous(memory_format=self._layout)), self.labels[indices]


def normalize(images: Tensor) -> Tensor:
    """ToTensor and Normalize(0.5, 0.5): uint8 0..255 becomes float32 -1..1, the same bits as torchvision's."""
    return images.float().div_(255).sub_(0.5).div_(0.5)


class BatchedDistributedSampler(DistributedSampler[Tensor]):
    """torch's DistributedSampler, whose items are the indices of whole micro-batches: int64 [batch], on the device.

    The ranks' k-th micro-batches together are the k-th slice of one permutation, whatever the world size. An item may
    be those of `together` micro-batches, one after the other.
    """

    def __init__(self, dataset: DeviceImages, rank: int, world_size: int, batch_size: int, seed: int) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, seed=derive_seed(seed, "shuffle"), drop_last=True)
        self.batch_size = batch_size
        self.first = 0
        self.chunk = 1
        self.device = dataset.labels.device

    def __len__(self) -> int:
        return self.num_samples // self.batch_size  # micro-batches

    def __iter__(self) -> Iterator[Tensor]:
        # What DistributedSampler.__iter__ computes, without making a Python list of 50,000 numbers.
        draws = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=draws)  # type: ignore[arg-type]
        own = order[self.rank : self.total_size : self.num_replicas].to(self.device)
        own = own[self.first * self.batch_size : len(self) * self.batch_size]
        yield from own.split(self.chunk * self.batch_size) if len(own) else ()


class TrainLoader(DataLoader[Any]):
    """Micro-batches of this rank, shuffled anew every epoch."""

    sampler: BatchedDistributedSampler
    dataset: DeviceImages

    def __init__(self, dataset: DeviceImages, plan: BatchPlan, rank: int, seed: int) -> None:
        sampler = BatchedDistributedSampler(dataset, rank, plan.world_size, plan.local_batch_size, seed)
        super().__init__(dataset, batch_size=None, sampler=sampler)
        sampler.chunk = max(1, CHUNK // plan.local_batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # type: ignore[override]
        size = self.sampler.batch_size
        for images, labels in super().__iter__():
            yield from zip(images.split(size), labels.split(size), strict=True)

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Choose the epoch's permutation and augmentation, and begin at its micro-batch `first`."""
        self.sampler.set_epoch(epoch)
        self.sampler.first = first
        if self.dataset.augment is not None:
            self.dataset.augment.set_epoch(epoch)


class EvalLoader(DataLoader[Any]):
    """Batches of this rank's share of the test set: every image once, none repeated to make the shares even.

    (DistributedSampler repeats images to that end, which is what spoils distributed accuracies:
    pytorch/pytorch#25162.)
    """

    sampler: Iterable[Tensor]
    dataset: DeviceImages

    def __init__(self, dataset: DeviceImages, rank: int, world_size: int) -> None:
        own = torch.arange(rank, len(dataset), world_size, device=dataset.labels.device)
        super().__init__(dataset, batch_size=None, sampler=own.split(EVAL_BATCH_SIZE))


@dataclass(frozen=True)
class Data:
    """What a run trains and tests on; `name` is that of the dataset."""

    name: str
    train: DeviceImages
    test: DeviceImages


def load_data(config: TrainConfig, runtime: Runtime) -> Data:
    """Find, fetch or make the data, the same on every rank, and put it on the device.

    Local rank zero downloads while the others wait.

    Raises:
        UserError: a file is damaged, or CIFAR-10 was asked for by name and can't be had.
    """
    missing = None
    if config.dataset in ("auto", "cifar10"):
        with runtime.fail_together():
            if runtime.local_rank == 0:
                required = config.dataset == "cifar10"
                missing = prepare_cifar10(config.data_dir, config.data_url, required, show=runtime.is_main)
    # One host without the data is enough for all to take the stand-in: they have to train on the same images.
    reasons = [reason for reason in runtime.gather(missing) if reason is not None]
    if reasons:
        runtime.print0(f"WARNING: training on the built-in stand-in, not on CIFAR-10: {reasons[0]}")
    name = config.dataset
    if name == "auto":
        name = "synthetic" if reasons else "cifar10"
    with runtime.fail_together():
        train, test = DATASETS[name](config.data_dir)

    device, layout = runtime.device, runtime.layout
    data = Data(name, DeviceImages(*train, device, layout), DeviceImages(*test, device, layout))
    if config.augment != "none":
        alternate = config.augment == "crop-altflip"
        data.train.augment = CropFlip(
            len(data.train), config.seed, device, config.crop_padding, alternate, config.cutout
        )
    return data
