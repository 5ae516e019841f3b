"""The loaders: which images come in which order, on which rank, and as what."""

import contextlib
import dataclasses
from pathlib import Path

import pytest
import torch
from torch.utils.data import DistributedSampler

import cifar.data
import cifar.datasets
from cifar.augment import CropFlip, derive_seed
from cifar.batch_plan import BatchPlan
from cifar.config import TrainConfig
from cifar.data import BatchedDistributedSampler, Data, DeviceImages, EvalLoader, TrainLoader, load_data, normalize
from cifar.errors import UserError

SIZE = 1000
CPU = torch.device("cpu")


def numbered(size: int = SIZE) -> DeviceImages:
    """Images told apart by their labels, which are their positions."""
    images = torch.randint(0, 256, (size, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return DeviceImages(images, torch.arange(size), CPU)


DATASET = numbered()


def micro_batches(rank: int, world_size: int, batch_size: int, epoch: int, seed: int = 0, first: int = 0):
    sampler = BatchedDistributedSampler(DATASET, rank, world_size, batch_size, seed)
    sampler.set_epoch(epoch)
    sampler.first = first
    return list(sampler)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [4, 7])
def test_sampler_is_torchs_own_in_batches(world_size, batch_size):
    """1,000 images on 3 ranks leave one over, and batches of 7 leave some more: both are dropped."""
    for epoch in (0, 1, 5):
        for rank in range(world_size):
            torchs: DistributedSampler = DistributedSampler(
                DATASET, world_size, rank, shuffle=True, seed=derive_seed(3, "shuffle"), drop_last=True
            )
            torchs.set_epoch(epoch)
            whole = len(torchs) // batch_size
            expected = torch.tensor(list(torchs))[: whole * batch_size].view(whole, batch_size)
            got = micro_batches(rank, world_size, batch_size, epoch, seed=3)
            assert all(batch.dtype == torch.int64 for batch in got)
            assert torch.equal(torch.stack(got), expected)
            assert len(BatchedDistributedSampler(DATASET, rank, world_size, batch_size, 3)) == whole


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 12), (2, 6), (3, 4), (4, 3), (1, 4), (2, 3), (1, 1)])
def test_the_kth_global_batch_is_the_kth_slice_of_one_permutation(world_size, batch_size):
    """At every world size, and with what is missing from a global batch of 12 made up by accumulation."""
    epoch, global_batch = 2, 12
    draws = torch.Generator().manual_seed(derive_seed(0, "shuffle") + epoch)
    permutation = torch.randperm(SIZE, generator=draws)
    accumulation = global_batch // (world_size * batch_size)
    ranks = [micro_batches(rank, world_size, batch_size, epoch) for rank in range(world_size)]
    steps = SIZE // global_batch
    assert steps == 83
    for step in range(steps):
        own = [batch for rank in ranks for batch in rank[step * accumulation : (step + 1) * accumulation]]
        expected = permutation[step * global_batch : (step + 1) * global_batch]
        assert torch.equal(torch.cat(own).sort().values, expected.sort().values)


def test_epochs_and_seeds_have_permutations_of_their_own():
    orders = [torch.cat(micro_batches(0, 1, 10, epoch, seed)) for epoch in range(3) for seed in range(3)]
    assert all(order.sort().values.equal(torch.arange(SIZE)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 9


def test_first_skips():
    """Resuming within an epoch: the micro-batches before are skipped, those after are the same."""
    whole = micro_batches(1, 2, 8, epoch=4)
    rest = micro_batches(1, 2, 8, epoch=4, first=20)
    assert len(rest) == len(whole) - 20 == 42
    assert all(a.equal(b) for a, b in zip(rest, whole[20:], strict=True))
    assert micro_batches(1, 2, 8, epoch=4, first=len(whole)) == []


def plan(world_size: int = 1, batch_size: int = 8) -> BatchPlan:
    return BatchPlan.make(TrainConfig(local_batch_size=batch_size), world_size, SIZE)


def test_train_loader_yields_what_it_promises():
    loader = TrainLoader(numbered(), plan(2), rank=1, seed=0)
    loader.set_epoch(1)
    batches = list(loader)
    assert len(batches) == len(loader) == 62
    for (images, labels), indices in zip(batches, micro_batches(1, 2, 8, epoch=1), strict=True):
        assert images.shape == (8, 3, 32, 32)
        assert images.dtype == torch.float32
        assert images.device == labels.device == CPU
        assert labels.dtype == torch.int64
        assert torch.equal(labels, indices)
        assert torch.equal(images, normalize(DATASET.images[indices]))


def test_train_loader_begins_at_first_and_forgets_it():
    loader = TrainLoader(numbered(), plan(), rank=0, seed=0)
    loader.set_epoch(0)
    whole = [labels for _, labels in loader]
    loader.set_epoch(0, first=100)
    rest = [labels for _, labels in loader]
    assert all(a.equal(b) for a, b in zip(rest, whole[100:], strict=True))
    loader.set_epoch(1)
    assert len(list(loader)) == len(whole)


def test_set_epoch_moves_the_augmentation_too():
    dataset = numbered()
    dataset.augment = CropFlip(SIZE, 0, CPU)
    loader = TrainLoader(dataset, plan(), rank=0, seed=0)
    for epoch in (2, 0, 1):
        loader.set_epoch(epoch)
        expected = CropFlip(SIZE, 0, CPU)
        expected.set_epoch(epoch)
        images, labels = next(iter(loader))
        assert torch.equal(images, normalize(expected(DATASET.images[labels], labels)))


def test_augmentation_is_the_same_at_every_world_size():
    """What an image looks like in an epoch doesn't depend on the rank or the micro-batch that it falls to."""
    seen = []
    for world_size in (1, 2, 4):
        looks: dict[int, bytes] = {}
        for rank in range(world_size):
            dataset = numbered()
            dataset.augment = CropFlip(SIZE, 0, CPU)
            loader = TrainLoader(dataset, plan(world_size, batch_size=50), rank, seed=0)
            loader.set_epoch(3)
            for images, labels in loader:
                looks |= {int(label): image.numpy().tobytes() for image, label in zip(images, labels, strict=True)}
        seen.append(looks)
    assert len(seen[0]) == SIZE
    assert seen[1] == seen[0]
    assert seen[2] == seen[0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_eval_loader_covers_every_image_once(world_size, monkeypatch):
    """At sizes that divide the 1,000 images and sizes that don't; batches of 64 leave a short one at the end."""
    monkeypatch.setattr(cifar.data, "EVAL_BATCH_SIZE", 64)
    shares = [list(EvalLoader(DATASET, rank, world_size)) for rank in range(world_size)]
    labels = torch.cat([labels for share in shares for _, labels in share])
    assert torch.equal(labels.sort().values, torch.arange(SIZE))
    sizes = [sum(len(labels) for _, labels in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert all(len(labels) <= 64 for share in shares for _, labels in share)
    images, own = shares[-1][0]
    assert images.dtype == torch.float32
    assert torch.equal(images, normalize(DATASET.images[own]))


def test_evaluation_is_not_augmented_by_training():
    """The two sets are two objects: the training set's augmentation isn't the test set's."""
    data = Data("synthetic", numbered(), numbered())
    data.train.augment = CropFlip(SIZE, 0, CPU)
    images, labels = next(iter(EvalLoader(data.test, 0, 1)))
    assert torch.equal(images, normalize(DATASET.images[labels]))


def test_normalize_is_torchvisions_to_the_last_bit():
    from torchvision.transforms import Compose, Normalize, ToTensor

    theirs = Compose([ToTensor(), Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(3, 1, 1)
    got = normalize(image[None])[0]
    expected = theirs(image.permute(1, 2, 0).numpy())
    assert got.dtype == torch.float32
    assert torch.equal(got.view(torch.int32), expected.contiguous().view(torch.int32))
    assert (got.min(), got.max()) == (-1, 1)


def test_normalize_leaves_the_images_alone():
    image = torch.full((1, 3, 32, 32), 200, dtype=torch.uint8)
    normalize(image)
    assert (image == 200).all()


# load_data, with ranks made up of what load_data asks of a runtime


@dataclasses.dataclass
class Rank:
    """One rank among others, whose word on what is missing comes from `others`."""

    local_rank: int = 0
    others: list[str | None] = dataclasses.field(default_factory=list)
    said: list[str] = dataclasses.field(default_factory=list)
    is_main: bool = True
    device: torch.device = CPU
    layout: torch.memory_format = torch.channels_last

    def fail_together(self):
        return contextlib.nullcontext()

    def gather(self, value):
        return [value, *self.others]

    def print0(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def sources(monkeypatch):
    """Calls of `prepare_cifar10`, whose answer is `sources.missing`; both data sets are small here."""

    class Sources:
        missing: str | None = None

        def __init__(self) -> None:
            self.asked: list[tuple] = []

    sources = Sources()

    def prepare(data_dir, data_url, required, show):
        sources.asked.append((data_dir, data_url, required))
        if required and sources.missing:
            raise UserError(sources.missing)
        return sources.missing

    def tensors(size: int):
        return torch.zeros(size, 3, 32, 32, dtype=torch.uint8), torch.zeros(size, dtype=torch.int64)

    monkeypatch.setattr(cifar.data, "prepare_cifar10", prepare)
    monkeypatch.setitem(cifar.data.DATASETS, "cifar10", lambda data_dir: (tensors(50), tensors(10)))
    monkeypatch.setitem(cifar.data.DATASETS, "synthetic", lambda data_dir: (tensors(5), tensors(1)))
    return sources


def config(dataset: str, **fields) -> TrainConfig:
    return TrainConfig(dataset=dataset, data_dir=Path("somewhere"), **fields)  # type: ignore[arg-type]


def load(config: TrainConfig, rank: Rank) -> Data:
    return load_data(config, rank)  # type: ignore[arg-type]


def test_auto_takes_cifar10_where_it_is(sources):
    rank = Rank(others=[None])
    data = load(config("auto", data_url="http://127.0.0.1:1/a"), rank)
    assert (data.name, len(data.train), len(data.test)) == ("cifar10", 50, 10)
    assert sources.asked == [(Path("somewhere"), "http://127.0.0.1:1/a", False)]
    assert rank.said == []


def test_auto_takes_the_stand_in_with_a_warning(sources):
    sources.missing = "no source serves it"
    rank = Rank()
    data = load(config("auto"), rank)
    assert (data.name, len(data.train)) == ("synthetic", 5)
    assert len(rank.said) == 1
    assert "WARNING" in rank.said[0]
    assert "no source serves it" in rank.said[0]


def test_cifar10_never_takes_the_stand_in(sources):
    sources.missing = "no source serves it"
    with pytest.raises(UserError, match="no source serves it"):
        load(config("cifar10"), Rank())
    assert [required for _, _, required in sources.asked] == [True]


def test_the_stand_in_asks_for_nothing(sources):
    rank = Rank(others=[None])
    assert load(config("synthetic"), rank).name == "synthetic"
    assert sources.asked == []
    assert rank.said == []


def test_only_local_rank_zero_fetches(sources):
    assert load(config("auto"), Rank(local_rank=1, others=[None])).name == "cifar10"
    assert sources.asked == []


def test_one_host_without_the_data_puts_all_on_the_stand_in(sources):
    """They have to train on the same images."""
    rank = Rank(others=[None, "the second host has no disk"])
    assert load(config("auto"), rank).name == "synthetic"
    assert "the second host has no disk" in rank.said[0]


def test_augmentation_is_for_training_and_by_choice(sources):
    assert load(config("auto"), Rank()).train.augment is None
    data = load(config("auto", augment="crop-flip"), Rank())
    assert isinstance(data.train.augment, CropFlip)
    assert data.test.augment is None


def test_a_damaged_file_is_not_replaced_by_the_stand_in(sources, monkeypatch):
    def damaged(data_dir):
        raise UserError("test_batch is damaged")

    monkeypatch.setitem(cifar.data.DATASETS, "cifar10", damaged)
    with pytest.raises(UserError, match="test_batch is damaged"):
        load(config("auto"), Rank())


def test_ten_classes_by_name(real_data):
    """The names under which accuracies are reported are the data set's, in its order and the tutorial's words."""
    import pickle

    theirs = pickle.loads((real_data / "cifar-10-batches-py" / "batches.meta").read_bytes())["label_names"]
    words = {"airplane": "plane", "automobile": "car"}
    assert tuple(words.get(name, name) for name in theirs) == cifar.datasets.CLASSES
