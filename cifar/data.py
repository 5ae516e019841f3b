"""A dataset as tensors on the device, behind DistributedSampler loaders."""

import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from cifar.augment import CropFlip, derive_seed
from cifar.batch_plan import BatchPlan
from cifar.config import TrainConfig
from cifar.datasets import DATASETS, PREPARE
from cifar.datasets.download import UnavailableError
from cifar.distributed.runtime import Runtime
from cifar.errors import UserError

EVAL_BATCH_SIZE = 1000
CHUNK = 1024  # images prepared at once; with tiny batches, the overhead of a call dominates
_SAMPLE = 5000  # training images for data-dependent initialization


class DeviceImages(Dataset[tuple[Tensor, Tensor]]):
    """Images and labels on one device, read in whole batches.

    Attributes:
        images: uint8 [n, 3, 32, 32], channels-last in memory.
        labels: int64 [n].
        classes: the class names, in the order of the labels.
        augment: applied to every batch before normalization, or None.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        classes: tuple[str, ...],
        device: torch.device,
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        self.images = images.to(device, memory_format=torch.channels_last)
        self.labels = labels.to(device)
        self.classes = classes
        self.augment: CropFlip | None = None
        self._memory_format = memory_format

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images, float32 [batch, 3, 32, 32] in [-1, 1], and labels, int64 [batch], of int64 [batch] indices."""
        # index_select copies whole images where [indices] would gather single bytes, but it ignores memory formats.
        images = self.images.permute(0, 2, 3, 1).index_select(0, indices).permute(0, 3, 1, 2)
        if self.augment is not None:
            images = self.augment(images, indices)
        return normalize(images.contiguous(memory_format=self._memory_format)), self.labels[indices]


def normalize(images: Tensor) -> Tensor:
    """Map uint8 0..255 to float32 -1..1: torchvision's ToTensor and Normalize(0.5, 0.5), to the same bits."""
    return images.float().div_(255).sub_(0.5).div_(0.5)


class BatchedDistributedSampler(DistributedSampler[Tensor]):
    """torch's DistributedSampler, yielding the indices of whole micro-batches: int64 [n], on the device.

    The k-th optimizer step takes the k-th slice of one permutation, at every world size W, and rank r every W-th image
    of it. An item has several micro-batches, of about `CHUNK` images together.

    Attributes:
        first: the optimizer step of the epoch to begin at.
        micro_batch_sizes: those of a step of this rank.
        chunk: micro-batches in an item.
    """

    def __init__(self, dataset: DeviceImages, plan: BatchPlan, rank: int, seed: int) -> None:
        seed = derive_seed(seed, "shuffle")
        super().__init__(dataset, num_replicas=plan.world_size, rank=rank, seed=seed, drop_last=True)
        self.first = 0
        self.micro_batch_sizes = plan.micro_batch_sizes(rank)
        self.chunk = max(1, CHUNK // self.micro_batch_sizes[0])
        self.device = dataset.labels.device
        self._plan = plan

    def __len__(self) -> int:
        return self._plan.steps_per_epoch

    def __iter__(self) -> Iterator[Tensor]:
        # As DistributedSampler.__iter__, without a Python list of 50,000 numbers.
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator)  # type: ignore[arg-type]
        steps = order[: len(self) * self._plan.global_batch_size].view(len(self), -1)
        shares = steps[self.first :, self.rank :: self.num_replicas].to(self.device)  # [steps, share]
        yield from shares.flatten().split([sum(item) for item in self.items()])

    def items(self) -> list[list[int]]:
        """Return the sizes of the micro-batches in each item."""
        sizes = self.micro_batch_sizes * (len(self) - self.first)
        return [sizes[k : k + self.chunk] for k in range(0, len(sizes), self.chunk)]


class TrainLoader(DataLoader[Any]):
    """The steps of this rank, reshuffled every epoch."""

    sampler: BatchedDistributedSampler
    dataset: DeviceImages

    def __init__(self, dataset: DeviceImages, plan: BatchPlan, rank: int, seed: int) -> None:
        sampler = BatchedDistributedSampler(dataset, plan, rank, seed)
        super().__init__(dataset, batch_size=None, sampler=sampler)

    def __iter__(self) -> Iterator[list[tuple[Tensor, Tensor]]]:  # type: ignore[override]
        """Yield the micro-batches of each optimizer step: images and labels, as `DeviceImages` returns them."""
        micro_batches = self._micro_batches()
        while step := list(islice(micro_batches, len(self.sampler.micro_batch_sizes))):
            yield step

    def _micro_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for (images, labels), sizes in zip(super().__iter__(), self.sampler.items(), strict=True):
            yield from zip(images.split(sizes), labels.split(sizes), strict=True)

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Select the permutation and the augmentation of `epoch`, and begin at its optimizer step `first`."""
        self.sampler.set_epoch(epoch)
        self.sampler.first = first
        if self.dataset.augment is not None:
            self.dataset.augment.set_epoch(epoch)


class EvalLoader(DataLoader[Any]):
    """Batches of this rank's shard of the test set, or of some of it, unpadded: each image is in exactly one shard.

    (DistributedSampler repeats images to make the shards even, which falsifies distributed accuracies:
    pytorch/pytorch#25162.)
    """

    sampler: Iterable[Tensor]
    dataset: DeviceImages

    def __init__(self, dataset: DeviceImages, rank: int, world_size: int, indices: Tensor | None = None) -> None:
        """Divide the images `indices`, int64 [n], or all of them, between the ranks."""
        indices = torch.arange(len(dataset)) if indices is None else indices
        shard = indices[rank::world_size].to(dataset.labels.device)
        super().__init__(dataset, batch_size=None, sampler=shard.split(EVAL_BATCH_SIZE) if len(shard) else ())


@dataclass(frozen=True)
class Data:
    """The training and the test set of a run.

    Attributes:
        name: of the dataset, "cifar10" for one.
        classes: the class names, in the order of the labels.
        plan: how the training images are divided into batches.
        note: what the banner says of the dataset besides, or nothing.
        fingerprint: what identifies the images of each split; see `Dataset.fingerprint`.
        decoder: the library that has decoded the images, with its version, or nothing.
    """

    name: str
    classes: tuple[str, ...]
    plan: BatchPlan
    train: TrainLoader
    test: EvalLoader
    note: str = ""
    fingerprint: dict[str, str] = field(default_factory=dict)
    decoder: str = ""

    def sample(self) -> Tensor:
        """Return the first 5,000 training images, normalized: float32 [n, 3, 32, 32] on the CPU."""
        return normalize(self.train.dataset.images[:_SAMPLE].cpu())


def load_data(config: TrainConfig, runtime: Runtime) -> Data:
    """Load the dataset, the same on every rank, onto the device. Collective.

    Local rank zero downloads or decodes it if it has to, while the others wait.

    Raises:
        UserError: a file is corrupt, the dataset is not available, the hosts have different images, or the batch sizes
            do not divide.
    """
    auto = config.dataset == "auto"
    name, missing = "cifar10" if auto else config.dataset, None
    with runtime.fail_together():
        if runtime.local_rank == 0 and name in PREPARE:
            try:
                PREPARE[name](config.data_dir, config.data_url)  # which prints the progress, on each host
            except UnavailableError as error:
                if not auto:
                    raise
                missing = error.reason
    # If one host lacks CIFAR-10, all use the synthetic dataset: they have to train on the same images.
    if reasons := [reason for reason in runtime.gather(missing) if reason is not None]:
        runtime.print0(f"WARNING: training on the synthetic dataset, not on CIFAR-10: {reasons[0]}")
        name = "synthetic"
    with runtime.fail_together():
        dataset = DATASETS[name](config.data_dir)
        dataset.check(name)
    fingerprint = dataset.fingerprint()
    _check_same(name, fingerprint, dataset.decoder, runtime)

    def to_device(split: tuple[Tensor, Tensor]) -> DeviceImages:
        return DeviceImages(*split, dataset.classes, runtime.device, runtime.memory_format)

    train, test = to_device(dataset.train), to_device(dataset.test)
    if config.augment != "none":
        alternate = config.augment == "crop-altflip"
        train.augment = CropFlip(len(train), config.seed, runtime.device, config.crop_padding, alternate, config.cutout)
    plan = BatchPlan.make(config, runtime.world_size, len(train))
    train_loader = TrainLoader(train, plan, runtime.rank, config.seed)
    test_loader = EvalLoader(test, runtime.rank, runtime.world_size)
    return Data(name, dataset.classes, plan, train_loader, test_loader, dataset.note, fingerprint, dataset.decoder)


def _check_same(name: str, fingerprint: dict[str, str], decoder: str, runtime: Runtime) -> None:
    """Check that all ranks have the same images. Collective.

    Raises:
        UserError: they do not; names the hosts.
    """
    ranks = runtime.gather((fingerprint, socket.gethostname() + (f" ({decoder})" if decoder else "")))
    for split in fingerprint:
        found = sorted({(host, theirs[split]) for theirs, host in ranks})
        if len({images for _, images in found}) > 1:
            different = " and ".join(f"{images} on {host}" for host, images in found)
            raise UserError(
                f"dataset {name}: the hosts have different {split} images: {different}: copy the same files to each"
            )
