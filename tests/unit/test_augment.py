"""CropFlip against torchvision, image by image, and as a function of (seed, epoch, image)."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import functional

from cifar.augment import CropFlip, derive_seed, generator

SIZE, SIDE = 200, 40
IMAGES = torch.randint(1, 256, (SIZE, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def augmented(seed: int = 0, epoch: int = 0, **options: int) -> Tensor:
    augment = CropFlip(IMAGES, seed, **options)
    augment.set_epoch(epoch)
    return augment(IMAGES, torch.arange(SIZE))


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 3), (5, 1)])
def test_equals_torchvision(seed, epoch):
    numbers = generator(seed, "augment", epoch)
    (rows, columns) = torch.randint(0, 9, (2, SIZE), generator=numbers)
    flips = torch.randint(0, 2, (SIZE,), generator=numbers, dtype=torch.bool)
    for image, got, row, column, flip in zip(IMAGES, augmented(seed, epoch), rows, columns, flips, strict=True):
        expected = functional.crop(functional.pad(image, [4, 4, 4, 4]), int(row), int(column), SIDE, SIDE)
        assert torch.equal(got, functional.hflip(expected) if flip else expected)


def test_independent_of_batches_order_earlier_epochs_and_the_global_generator():
    before = torch.get_rng_state()
    augment = CropFlip(IMAGES, 0)
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(2))
    for epoch, size in ((0, 64), (1, 7), (3, 1), (0, 200)):
        augment.set_epoch(epoch)
        whole = augmented(epoch=epoch)
        for batch in order.split(size):
            assert torch.equal(augment(IMAGES[batch], batch), whole[batch])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 1}, {"seed": 1, "epoch": 1}], ids=str)
def test_epochs_and_seeds_differ(other):
    same = (augmented() == augmented(**other)).flatten(1).all(1)
    assert same.float().mean() < 0.05  # one image in 162 is drawn alike by chance


def test_seeds_by_purpose():
    purposes = [(seed, name, n) for seed in range(5) for name in ("augment", "shuffle") for n in range(5)]
    assert len({derive_seed(*purpose) for purpose in purposes}) == 50
    assert derive_seed(0, "shuffle") == 4003579409339643648  # so that runs of earlier versions resume exactly


def test_alternating_flips():
    first, second, third = (augmented(epoch=epoch, padding=0, alternate=True) for epoch in range(3))
    assert torch.equal(second, first.flip(3))
    assert torch.equal(third, first)
    assert 0.35 < (first != IMAGES).flatten(1).any(1).float().mean() < 0.65


def test_alternating_crops_are_padded_by_reflection():
    got = augmented(padding=2, alternate=True)
    padded = F.pad(IMAGES, (2, 2, 2, 2), "reflect")
    crops = [padded[:, :, r : r + SIDE, c : c + SIDE] for r in range(5) for c in range(5)]
    found = sum((got == view).flatten(1).all(1).int() for crop in crops for view in (crop, crop.flip(3)))
    assert (found >= 1).all()
    assert (got != IMAGES).flatten(1).any(1).float().mean() > 0.9


def test_cutout_is_one_square_clipped_at_the_edges():
    augment = CropFlip(IMAGES, 0, padding=0, cutout=12)
    blank = (augment(torch.full_like(IMAGES, 255), torch.arange(SIZE)) == 128).all(1)
    sides = torch.stack([blank.any(2).sum(1), blank.any(1).sum(1)])
    assert torch.equal(blank.flatten(1).sum(1), sides[0] * sides[1])
    assert (sides.max(), sides.min() >= 6) == (12, True)
    assert blank.any(0).all(), "every pixel may be blank"
