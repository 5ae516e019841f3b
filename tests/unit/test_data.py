"""The loaders: the order of the images, each rank's share, the normalization; and the choice of the dataset."""

import contextlib
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchvision.transforms import Compose, Normalize, ToTensor

from cifar import data
from cifar.augment import CropFlip, derive_seed
from cifar.batch_plan import BatchPlan
from cifar.config import TrainConfig
from cifar.data import BatchedDistributedSampler, Data, DeviceImages, TrainLoader, load_data, normalize
from cifar.datasets import choice
from cifar.datasets.cifar10 import CLASSES
from cifar.datasets.download import UnavailableError
from cifar.errors import LocalError, UserError
from tests.helpers.comparing import tiny_dataset

SIZE = 1000
CPU = torch.device("cpu")


def numbered() -> DeviceImages:
    """Return images whose labels are their indices."""
    images = torch.randint(0, 256, (SIZE, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return DeviceImages(images, torch.arange(SIZE), CLASSES, CPU)


DATASET = numbered()


def plan(world_size: int = 1, local: int = 8, whole: int | None = None) -> BatchPlan:
    return BatchPlan.make(TrainConfig(local_batch_size=local, global_batch_size=whole), world_size, SIZE)


def steps(rank: int, plan: BatchPlan, epoch: int, seed: int = 0) -> list[torch.Tensor]:
    """Return the indices of each step of a rank."""
    sampler = BatchedDistributedSampler(DATASET, plan, rank, seed)
    sampler.set_epoch(epoch)
    return list(torch.cat(list(sampler)).split(sum(sampler.micro_batch_sizes)))


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


@pytest.mark.parametrize("chunk", [1, 10 * 2**10, 2**20])
@pytest.mark.parametrize("divided", [plan(2), plan(2, 8, 33), plan(3, 4, 40)])
def test_train_loader(monkeypatch, chunk, divided):
    """However many images are prepared at once, and on whichever rank, an image of an epoch is augmented the same."""
    monkeypatch.setattr(data, "CHUNK", chunk)
    dataset, expected = numbered(), CropFlip(DATASET.images, 0)
    dataset.augment = CropFlip(DATASET.images, 0)
    loader = TrainLoader(dataset, divided, rank=1, seed=0)
    for part in (loader, expected):
        part.set_epoch(1)
    loaded = list(loader)
    assert len(loaded) == len(loader) == divided.steps_per_epoch
    for batches, indices in zip(loaded, steps(1, divided, epoch=1), strict=True):
        assert [len(labels) for _, labels in batches] == divided.micro_batch_sizes(1)
        images, labels = map(torch.cat, zip(*batches, strict=True))
        assert (images.shape[1:], images.dtype, labels.dtype) == ((3, 32, 32), torch.float32, torch.int64)
        assert torch.equal(labels, indices)
        assert torch.equal(images, normalize(expected(DATASET.images[indices], indices)))


def test_normalize_equals_torchvision_bit_for_bit():
    theirs = Compose([ToTensor(), Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(3, 1, 1)
    before = image.clone()
    got = normalize(image[None])[0]
    expected = theirs(image.permute(1, 2, 0).numpy())
    assert torch.equal(got.view(torch.int32), expected.contiguous().view(torch.int32))
    assert torch.equal(image, before)


# load_data, with a rank that has what load_data needs of a runtime


def make_rank(local_rank=0, others=(), images=None):
    """Return a rank; `others` is what the other ranks report as missing, `images` the fingerprint of another host."""

    def gather(value):
        if isinstance(value, tuple):
            return [value, (images or value[0], "elsewhere"), (value[0], "here")]
        return [value, *others]

    printed: list[str] = []
    return SimpleNamespace(
        rank=0, local_rank=local_rank, world_size=1, is_main=True, device=CPU, memory_format=torch.channels_last,
        printed=printed, print0=printed.append, gather=gather, fail_together=contextlib.nullcontext,
    )  # fmt: skip


@pytest.fixture
def source(monkeypatch):
    """Replace the download of CIFAR-10: `asked` has the arguments of each call; they fail with `missing`."""
    source = SimpleNamespace(missing=None, asked=[])

    def prepare(config):
        source.asked.append((config.data_dir, config.data_url))
        if source.missing:
            raise UnavailableError(source.missing)

    monkeypatch.setitem(choice.PREPARE, "cifar10", prepare)
    monkeypatch.setitem(choice.DATASETS, "cifar10", lambda _: replace(tiny_dataset(50), decoder="Pillow 1"))
    monkeypatch.setitem(choice.DATASETS, "synthetic", lambda _: tiny_dataset(10))
    return source


def load(dataset: str, rank=None, **fields) -> Data:
    config = TrainConfig(dataset=dataset, data_dir=Path("somewhere"), data_url="http://127.0.0.1:1/a", **fields)
    return load_data(config, rank or make_rank())


NO_SOURCE, NO_DISK = "no source serves it", "the second host has no disk"


@pytest.mark.parametrize(
    ("dataset", "local_rank", "missing", "others", "name", "warns"),
    [
        ("auto", 0, None, [None], "cifar10", None),
        ("auto", 1, None, [None], "cifar10", None),
        ("auto", 0, NO_SOURCE, [], "synthetic", NO_SOURCE),
        ("auto", 0, None, [None, NO_DISK], "synthetic", NO_DISK),
        ("synthetic", 0, NO_SOURCE, [None], "synthetic", None),
    ],
)
def test_auto_uses_cifar10_or_says_why_not(source, dataset, local_rank, missing, others, name, warns):
    """Only local rank zero downloads, and one host without CIFAR-10 makes all use the synthetic dataset."""
    source.missing = missing
    rank = make_rank(local_rank, others)
    data = load(dataset, rank)
    assert (data.name, data.classes, len(data.train.dataset)) == (name, CLASSES, {"cifar10": 50, "synthetic": 10}[name])
    downloads = dataset == "auto" and local_rank == 0
    assert source.asked == [(Path("somewhere"), "http://127.0.0.1:1/a")] * downloads
    expected = f"WARNING: training on the synthetic dataset, not on CIFAR-10: {warns}"
    assert rank.printed == ([expected] if warns else [])


def test_cifar10_never_falls_back(source, monkeypatch):
    source.missing = NO_SOURCE
    with pytest.raises(UserError, match=NO_SOURCE):
        load("cifar10")

    def corrupt(config):
        raise UserError("test_batch is corrupt")

    source.missing = None
    monkeypatch.setitem(choice.DATASETS, "cifar10", corrupt)
    for dataset in ("cifar10", "auto"):
        with pytest.raises(UserError, match="test_batch is corrupt"):
            load(dataset)


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("split", ["training", "test"])
def test_hosts_with_other_images_are_named(split):
    own = load("auto").fingerprint
    theirs = own | {split: "9 images, SHA-256 0123456789abcdef"}
    with pytest.raises(UserError, match=f"^dataset cifar10: the hosts have different {split} images: .*$") as caught:
        load("auto", make_rank(images=theirs))
    for words in (f"{own[split]} on here", f"{theirs[split]} on elsewhere", f" on {socket.gethostname()} (Pillow 1)"):
        assert words in str(caught.value)


@pytest.mark.usefixtures("source")
def test_images_that_do_not_fit_the_device_are_refused_with_their_size(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(data, "DeviceImages", fail)
    monkeypatch.setitem(choice.DATASETS, "cifar10", lambda _: tiny_dataset(50_000))
    with pytest.raises(LocalError, match=r"^the images of cifar10 take 0\.3 GB, which cpu does not have free: lower"):
        load("auto")


@pytest.mark.usefixtures("source")
def test_model_that_does_not_take_images_of_this_size_is_refused(monkeypatch):
    split = torch.zeros(10, 3, 48, 48, dtype=torch.uint8), torch.zeros(10, dtype=torch.int64)
    larger = replace(tiny_dataset(10), train=split, test=split)
    monkeypatch.setitem(choice.DATASETS, "cifar10", lambda _: larger)
    with pytest.raises(UserError, match=r"^the model net does not take images of 48 x 48: try --model speed \(mat1"):
        load("auto")
    loaded = load("auto", model="speed")
    assert (loaded.image_size, loaded.train.dataset.count(5 * 48**2 - 1)) == (48, 4)


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize(("augment", "kind"), [("none", type(None)), ("crop-flip", CropFlip)])
def test_only_training_images_are_augmented(augment, kind):
    data = load("auto", augment=augment)
    assert isinstance(data.train.dataset.augment, kind)
    assert data.test.dataset.augment is None
