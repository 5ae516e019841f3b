"""The loaders: the order of the images, each rank's share, the normalization; and the choice of the dataset."""

import contextlib
import dataclasses
import socket
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch.utils.data import DistributedSampler
from torchvision.transforms import Compose, Normalize, ToTensor

from cifar import data
from cifar.augment import CropFlip, derive_seed
from cifar.batch_plan import BatchPlan
from cifar.config import TrainConfig
from cifar.data import BatchedDistributedSampler, Data, DeviceImages, EvalLoader, TrainLoader, load_data, normalize
from cifar.datasets import choice
from cifar.datasets.base import Dataset
from cifar.datasets.cifar10 import CLASSES
from cifar.datasets.download import UnavailableError
from cifar.errors import UserError

SIZE = 1000
CPU = torch.device("cpu")


def numbered() -> DeviceImages:
    """Return images whose labels are their indices."""
    images = torch.randint(0, 256, (SIZE, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return DeviceImages(images, torch.arange(SIZE), CLASSES, CPU)


DATASET = numbered()


def plan(world_size: int = 1, batch_size: int = 8, global_batch_size: int | None = None) -> BatchPlan:
    return BatchPlan.make(
        TrainConfig(local_batch_size=batch_size, global_batch_size=global_batch_size), world_size, SIZE
    )


def steps(rank: int, plan: BatchPlan, epoch: int, seed: int = 0) -> list[torch.Tensor]:
    """Return the indices of each step of a rank."""
    sampler = BatchedDistributedSampler(DATASET, plan, rank, seed)
    sampler.set_epoch(epoch)
    return list(torch.cat(list(sampler)).split(sum(sampler.micro_batch_sizes)))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [4, 7])
def test_sampler_equals_torchs_in_batches(world_size, batch_size):
    """1,000 images on 3 ranks leave one over, and batches of 7 some more: both are dropped."""
    for epoch in (0, 5):
        for rank in range(world_size):
            theirs: DistributedSampler = DistributedSampler(
                DATASET, world_size, rank, shuffle=True, seed=derive_seed(3, "shuffle"), drop_last=True
            )
            theirs.set_epoch(epoch)
            whole = len(theirs) // batch_size
            expected = torch.tensor(list(theirs))[: whole * batch_size].view(whole, batch_size)
            assert torch.equal(torch.stack(steps(rank, plan(world_size, batch_size), epoch, seed=3)), expected)
            assert len(BatchedDistributedSampler(DATASET, plan(world_size, batch_size), rank, 3)) == whole


@pytest.mark.parametrize(
    ("world_size", "batch_size"), [(1, 12), (2, 6), (3, 4), (4, 3), (1, 4), (2, 3), (1, 1), (5, 12), (7, 1), (12, 2)]
)
def test_kth_global_batch_is_the_kth_slice_of_one_permutation(world_size, batch_size):
    """At each world size, with and without accumulation to the global batch of 12, also if it does not divide."""
    epoch, divided = 2, plan(world_size, batch_size, 12)
    draws = torch.Generator().manual_seed(derive_seed(0, "shuffle") + epoch)
    permutation = torch.randperm(SIZE, generator=draws)
    ranks = [steps(rank, divided, epoch) for rank in range(world_size)]
    for k, shares in enumerate(zip(*ranks, strict=True)):
        for rank, share in enumerate(shares):
            assert share.tolist() == permutation[12 * k : 12 * (k + 1)][rank::world_size].tolist()
    assert k == SIZE // 12 - 1


def test_epochs_and_seeds_have_different_permutations():
    orders = [torch.cat(steps(0, plan(), epoch, seed)) for epoch in range(3) for seed in range(3)]
    assert all(order.sort().values.equal(torch.arange(SIZE)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 9


@pytest.mark.parametrize("chunk", [1, 10, 1024])
@pytest.mark.parametrize("divided", [plan(2), plan(2, 8, 33), plan(3, 4, 40)])
def test_train_loader(monkeypatch, chunk, divided):
    """However many images are prepared at once."""
    monkeypatch.setattr(data, "CHUNK", chunk)
    loader = TrainLoader(numbered(), divided, rank=1, seed=0)
    loader.set_epoch(1)
    loaded = list(loader)
    assert len(loaded) == len(loader) == divided.steps_per_epoch
    for batches, indices in zip(loaded, steps(1, divided, epoch=1), strict=True):
        assert [len(labels) for _, labels in batches] == divided.micro_batch_sizes(1)
        images, labels = map(torch.cat, zip(*batches, strict=True))
        assert (images.shape[1:], images.dtype, labels.dtype) == ((3, 32, 32), torch.float32, torch.int64)
        assert torch.equal(labels, indices)
        assert torch.equal(images, normalize(DATASET.images[indices]))


def test_train_loader_begins_within_an_epoch():
    loader = TrainLoader(numbered(), plan(1, 3, 8), rank=0, seed=0)

    def labels_of_epoch(epoch, first=0):
        loader.set_epoch(epoch, first)
        return [[labels.tolist() for _, labels in batches] for batches in loader]

    whole = labels_of_epoch(0)
    assert labels_of_epoch(0, first=100) == whole[100:]
    assert labels_of_epoch(0, first=len(whole)) == []
    assert len(labels_of_epoch(1)) == len(whole)


def test_augmentation_is_the_same_at_every_world_size():
    """An image of an epoch looks the same on whichever rank and in whichever micro-batch."""
    expected = CropFlip(SIZE, 0, CPU)
    expected.set_epoch(3)
    for world_size in (1, 2, 4):
        for rank in range(world_size):
            dataset = numbered()
            dataset.augment = CropFlip(SIZE, 0, CPU)
            loader = TrainLoader(dataset, plan(world_size, batch_size=50), rank, seed=0)
            loader.set_epoch(3)
            for images, labels in chain.from_iterable(loader):
                assert torch.equal(images, normalize(expected(DATASET.images[labels], labels)))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_eval_loaders_cover_each_image_once(world_size, monkeypatch):
    monkeypatch.setattr(data, "EVAL_BATCH_SIZE", 64)
    shards = [list(EvalLoader(DATASET, rank, world_size)) for rank in range(world_size)]
    labels = torch.cat([labels for shard in shards for _, labels in shard])
    assert torch.equal(labels.sort().values, torch.arange(SIZE))
    sizes = [sum(len(labels) for _, labels in shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    images, own = shards[-1][0]
    assert torch.equal(images, normalize(DATASET.images[own]))


def test_normalize_equals_torchvision_bit_for_bit():
    theirs = Compose([ToTensor(), Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(3, 1, 1)
    before = image.clone()
    got = normalize(image[None])[0]
    expected = theirs(image.permute(1, 2, 0).numpy())
    assert torch.equal(got.view(torch.int32), expected.contiguous().view(torch.int32))
    assert torch.equal(image, before)


# load_data, with a rank that has what load_data needs of a runtime


@dataclasses.dataclass
class Rank:
    """One rank; `others` is what the other ranks report as missing, `images` the fingerprint of another host."""

    local_rank: int = 0
    others: list[str | None] = dataclasses.field(default_factory=list)
    images: dict[str, str] | None = None
    printed: list[str] = dataclasses.field(default_factory=list)
    is_main: bool = True
    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU
    memory_format: torch.memory_format = torch.channels_last

    def fail_together(self):
        return contextlib.nullcontext()

    def gather(self, value):
        if isinstance(value, tuple):
            return [value, (self.images or value[0], "elsewhere"), (value[0], "here")]
        return [value, *self.others]

    def print0(self, text: str) -> None:
        self.printed.append(text)


class Sources:
    """Replaces `prepare_cifar10`: records its calls; raises an error if `missing`."""

    def __init__(self) -> None:
        self.missing: str | None = None
        self.asked: list[tuple] = []

    def __call__(self, data_dir, data_url):
        self.asked.append((data_dir, data_url))
        if self.missing:
            raise UnavailableError(f"not available: {self.missing}", self.missing)


@pytest.fixture
def sources(monkeypatch):
    sources = Sources()

    def dataset(*sizes: int) -> Dataset:
        splits = ((torch.zeros(n, 3, 32, 32, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64)) for n in sizes)
        return Dataset(CLASSES, *splits)

    monkeypatch.setitem(choice.PREPARE, "cifar10", sources)
    monkeypatch.setitem(choice.DATASETS, "cifar10", lambda data_dir: dataset(50, 10))
    monkeypatch.setitem(choice.DATASETS, "synthetic", lambda data_dir: dataset(5, 1))
    return sources


def load(dataset: str, rank: Rank, **fields) -> Data:
    return load_data(TrainConfig(dataset=dataset, data_dir=Path("somewhere"), **fields), rank)  # type: ignore[arg-type]


def test_auto_uses_cifar10(sources):
    rank = Rank(others=[None])
    data = load("auto", rank, data_url="http://127.0.0.1:1/a")
    assert (data.name, data.classes) == ("cifar10", CLASSES)
    assert (len(data.train.dataset), len(data.test.dataset)) == (50, 10)
    assert sources.asked == [(Path("somewhere"), "http://127.0.0.1:1/a")]
    assert rank.printed == []


def test_auto_falls_back_to_synthetic_with_a_warning(sources):
    sources.missing = "no source serves it"
    rank = Rank()
    assert load("auto", rank).name == "synthetic"
    (line,) = rank.printed
    assert line.startswith("WARNING")
    assert "no source serves it" in line


def test_cifar10_never_falls_back(sources, monkeypatch):
    sources.missing = "no source serves it"
    with pytest.raises(UserError, match="no source serves it"):
        load("cifar10", Rank())

    def corrupt(data_dir):
        raise UserError("test_batch is corrupt")

    sources.missing = None
    monkeypatch.setitem(choice.DATASETS, "cifar10", corrupt)
    for dataset in ("cifar10", "auto"):
        with pytest.raises(UserError, match="test_batch is corrupt"):
            load(dataset, Rank())


def test_synthetic_needs_no_source(sources):
    rank = Rank(others=[None])
    assert load("synthetic", rank).name == "synthetic"
    assert (sources.asked, rank.printed) == ([], [])


def test_only_local_rank_zero_downloads(sources):
    assert load("auto", Rank(local_rank=1, others=[None])).name == "cifar10"
    assert sources.asked == []


def test_a_host_without_cifar10_makes_all_use_synthetic(sources):
    rank = Rank(others=[None, "the second host has no disk"])
    assert load("auto", rank).name == "synthetic"
    assert "the second host has no disk" in rank.printed[0]


@pytest.mark.parametrize("split", ["training", "test"])
def test_hosts_with_other_images_are_named(sources, split):
    own = load("auto", Rank()).fingerprint
    theirs = own | {split: "9 images, SHA-256 0123456789abcdef"}
    with pytest.raises(UserError) as caught:
        load("auto", Rank(images=theirs))
    text = str(caught.value)
    assert f"dataset cifar10: the hosts have different {split} images: " in text
    for words in (f"{own[split]} on here", f"{own[split]} on {socket.gethostname()}", f"{theirs[split]} on elsewhere"):
        assert words in text
    assert "\n" not in text


def test_only_training_images_are_augmented(sources):
    assert load("auto", Rank()).train.dataset.augment is None
    data = load("auto", Rank(), augment="crop-flip")
    assert isinstance(data.train.dataset.augment, CropFlip)
    assert data.test.dataset.augment is None
