"""A dataset as tensors on the device, behind DistributedSampler loaders."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from cifar.augment import AUGMENTATIONS, Augmentation, derive_seed
from cifar.batch_plan import BatchPlan
from cifar.config import TrainConfig
from cifar.datasets.choice import choose_dataset
from cifar.datasets.folder import IMAGE_SIZE
from cifar.distributed.runtime import Runtime
from cifar.errors import LocalError, UserError, first_line, out_of_memory
from cifar.models import MODELS

# In pixels, so that larger images need no more memory; CIFAR's have 2**10.
EVAL_BATCH = 1000 * 2**10
CHUNK = 2**20  # prepared at once; with tiny batches, the overhead of a call dominates
_SAMPLE = 5000 * 2**10  # of the training images, for data-dependent initialization


class DeviceImages(Dataset[tuple[Tensor, Tensor]]):
    """Images and labels on one device, read in whole batches."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        classes: tuple[str, ...],
        device: torch.device,
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        self.images = images.to(device, memory_format=torch.channels_last)  # uint8 [n, 3, size, size]
        self.labels = labels.to(device)  # int64 [n]
        self.classes = classes  # names, in the order of the labels
        self.augment: Augmentation | None = None  # of every batch, before normalization
        self._memory_format = memory_format

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images, float32 [n, 3, size, size] in [-1, 1], and labels, int64 [n], of int64 [n] `indices`."""
        # index_select copies whole images where [indices] would gather single bytes, but it ignores memory formats.
        images = self.images.permute(0, 2, 3, 1).index_select(0, indices).permute(0, 3, 1, 2)
        if self.augment is not None:
            images = self.augment(images, indices)
        return normalize(images.contiguous(memory_format=self._memory_format)), self.labels[indices]

    def count(self, pixels: int) -> int:
        """Return how many of the images have `pixels` pixels together, at least one."""
        return max(1, pixels // self.images.shape[-1] ** 2)


def normalize(images: Tensor) -> Tensor:
    """Map uint8 0..255 to float32 -1..1: torchvision's ToTensor and Normalize(0.5, 0.5), to the same bits."""
    return images.float().div_(255).sub_(0.5).div_(0.5)


class BatchedDistributedSampler(DistributedSampler[Tensor]):
    """torch's DistributedSampler, yielding the indices of whole micro-batches: int64 [n], on the device.

    The k-th optimizer step takes the k-th slice of one permutation, at every world size W, and rank r every W-th image
    of it. An item has several micro-batches, of about `CHUNK` pixels together.
    """

    def __init__(self, dataset: DeviceImages, plan: BatchPlan, rank: int, seed: int) -> None:
        seed = derive_seed(seed, "shuffle")
        super().__init__(dataset, num_replicas=plan.world_size, rank=rank, seed=seed, drop_last=True)
        self.first = 0  # optimizer step of the epoch to begin at
        self.micro_batch_sizes = plan.micro_batch_sizes(rank)  # of a step of this rank
        self.chunk = max(1, dataset.count(CHUNK) // self.micro_batch_sizes[0])  # micro-batches in an item
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
        batches = shard.split(dataset.count(EVAL_BATCH)) if len(shard) else ()
        super().__init__(dataset, batch_size=None, sampler=batches)
        self._rank, self._world_size = rank, world_size

    def subset(self, indices: Tensor) -> "EvalLoader":
        """Return a loader of this rank's shard of the images `indices`, int64 [n]."""
        return EvalLoader(self.dataset, self._rank, self._world_size, indices)


@dataclass(frozen=True)
class Data:
    """The training and the test set of a run."""

    name: str  # of the dataset, "cifar10" for one
    classes: tuple[str, ...]  # names, in the order of the labels
    plan: BatchPlan  # how the training images are divided into batches
    train: TrainLoader
    test: EvalLoader
    note: str = ""  # this and the following: see `datasets.base.Dataset`
    fingerprint: dict[str, str] = field(default_factory=dict)
    decoder: str = ""

    def describe(self, data_dir: Path) -> str:
        """Return the dataset in one phrase, for the banner."""
        source = "" if self.name == "synthetic" else f", from {data_dir}"
        sizes = f"{len(self.train.dataset):,} training, {len(self.test.dataset):,} test"
        pixels = "" if self.image_size == IMAGE_SIZE else f", {self.image_size} x {self.image_size}"
        note = f"; {self.note}" if self.note else ""
        return f"{self.name}{source}: {sizes}{pixels}, {len(self.classes)} classes{note}"

    @property
    def image_size(self) -> int:
        """Return the side of an image in pixels."""
        return self.train.dataset.images.shape[-1]

    def sample(self) -> Tensor:
        """Return the first training images, normalized: float32 [n, 3, size, size] on the CPU."""
        dataset = self.train.dataset
        return normalize(dataset.images[: dataset.count(_SAMPLE)].cpu())


def load_data(config: TrainConfig, runtime: Runtime) -> Data:
    """Load the dataset, the same on every rank, onto the device. Collective.

    A UserError says that the model does not take images of this size, or that they do not fit the device.
    """
    if config.image_size is not None:  # before its pictures are decoded
        _check_model(config.model, config.image_size)
    name, dataset = choose_dataset(config, runtime)
    if config.image_size is None:
        _check_model(config.model, dataset.image_size)
    try:
        train, test = (
            DeviceImages(*split, dataset.classes, runtime.device, runtime.memory_format)
            for split in (dataset.train, dataset.test)
        )
    except RuntimeError as error:
        if out_of_memory(error) is None:
            raise
        total = sum(images.nbytes for images, _ in (dataset.train, dataset.test))
        reason = f"the images of {name} take {total / 1e9:.1f} GB, which {runtime.device} does not have free"
        raise LocalError(f"{reason}: lower --image-size, or end the other programs that use it") from error
    train.augment = AUGMENTATIONS[config.augment](config, train.images)
    plan = BatchPlan.make(config, runtime.world_size, len(train))
    train_loader = TrainLoader(train, plan, runtime.rank, config.seed)
    test_loader = EvalLoader(test, runtime.rank, runtime.world_size)
    about = (dataset.note, dataset.fingerprint, dataset.decoder)
    return Data(name, dataset.classes, plan, train_loader, test_loader, *about)


def _check_model(name: str, image_size: int) -> None:
    """Check that a model takes images of this size, by one; all take CIFAR's."""
    if image_size == IMAGE_SIZE:
        return
    model, image = MODELS[name](2).eval(), torch.zeros(1, 3, image_size, image_size)
    try:
        with torch.no_grad():
            model(image)
    except RuntimeError as error:
        mistake = f"the model {name} does not take images of {image_size} x {image_size}: try --model speed"
        raise UserError(f"{mistake} ({first_line(error)})") from error
