"""CropFlip against the plain way to do it, one image at a time, and as a function of (seed, epoch, image) alone."""

import pytest
import torch
from torch import Tensor

from cifar.augment import CropFlip, derive_seed, generator

SIZE = 200
CPU = torch.device("cpu")
IMAGES = torch.randint(1, 256, (SIZE, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def augmented(seed: int = 0, epoch: int = 0, indices: Tensor | None = None) -> Tensor:
    indices = torch.arange(SIZE) if indices is None else indices
    augment = CropFlip(SIZE, seed, CPU)
    augment.set_epoch(epoch)
    return augment(IMAGES[indices], indices)


def draws(seed: int, epoch: int, size: int = SIZE) -> list[tuple[int, int, bool]]:
    """(row, column, flip) of every image, as the table of an epoch is defined."""
    numbers = generator(seed, "augment", epoch)
    shifts = torch.randint(0, 9, (2, size), generator=numbers)
    flips = torch.randint(0, 2, (size,), generator=numbers, dtype=torch.bool)
    return list(zip(shifts[0].tolist(), shifts[1].tolist(), flips.tolist(), strict=True))


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 3), (5, 1)])
def test_the_same_as_torchvision_image_by_image(seed, epoch):
    from torchvision.transforms import functional

    for image, got, (row, column, flip) in zip(IMAGES, augmented(seed, epoch), draws(seed, epoch), strict=True):
        expected = functional.crop(functional.pad(image, [4, 4, 4, 4]), row, column, 32, 32)
        if flip:
            expected = functional.hflip(expected)
        assert torch.equal(got, expected)


def test_stays_what_it_was():
    got = augmented()
    assert got.dtype == torch.uint8
    assert got.shape == IMAGES.shape


def test_the_same_in_any_batches_and_any_order():
    """Whichever rank meets an image, in whichever micro-batch, does the same to it."""
    whole = augmented(epoch=2)
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(2))
    for size in (1, 7, 64):
        for batch in order.split(size):
            assert torch.equal(augmented(epoch=2, indices=batch), whole[batch])


def test_an_epoch_does_not_depend_on_those_before():
    walked = CropFlip(SIZE, 0, CPU)
    for epoch in range(4):
        walked.set_epoch(epoch)
    assert torch.equal(walked(IMAGES, torch.arange(SIZE)), augmented(epoch=3))
    walked.set_epoch(0)
    assert torch.equal(walked(IMAGES, torch.arange(SIZE)), augmented(epoch=0))


def test_does_not_touch_torchs_own_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    augmented()
    assert torch.equal(torch.get_rng_state(), before)


def test_begins_at_epoch_zero():
    assert torch.equal(CropFlip(SIZE, 0, CPU)(IMAGES, torch.arange(SIZE)), augmented(epoch=0))


@pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 1}, {"seed": 1, "epoch": 1}], ids=str)
def test_epochs_and_seeds_differ(other):
    """Most images look different: one in 162 is drawn alike by chance."""
    same = (augmented() == augmented(**other)).flatten(1).all(1)
    assert same.float().mean() < 0.05


def test_the_padding_is_black():
    """Seen on all-white images: what is black comes from outside, and makes up the rows and columns moved in."""
    augment = CropFlip(SIZE, 0, CPU)
    got = augment(torch.full_like(IMAGES, 255), torch.arange(SIZE))
    assert set(got.unique().tolist()) == {0, 255}
    for image, (row, column, _) in zip(got, draws(0, 0), strict=True):
        assert (image == 255).sum() == 3 * (32 - abs(row - 4)) * (32 - abs(column - 4))


def test_every_crop_and_both_flips_about_equally():
    """The 162 outcomes, told apart by where a marked pixel goes and what became of its right neighbour."""
    count = 162 * 200
    marked = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    marked[..., 16, 16], marked[..., 16, 17] = 1, 2
    augment = CropFlip(count, 0, CPU)
    got = torch.cat(
        [augment(marked.expand(len(batch), -1, -1, -1), batch) for batch in torch.arange(count).split(1000)]
    ).flatten(1)
    at, neighbour = (got == 1).int().argmax(1), (got == 2).int().argmax(1)
    outcomes, counts = torch.stack([at, neighbour]).unique(dim=1, return_counts=True)
    assert outcomes.shape[1] == 162
    # Chi-squared with 161 degrees of freedom: mean 161, standard deviation 18.
    chi_squared = ((counts - 200.0) ** 2 / 200).sum()
    assert 161 - 4 * 18 < chi_squared < 161 + 4 * 18


def test_seeds_are_told_apart_by_purpose():
    """Each purpose has a seed of its own, pinned: a resumed run of an older version draws the same."""
    assert derive_seed(0, "augment", 0) == derive_seed(0, "augment", 0)
    seeds = {
        derive_seed(seed, name, epoch) for seed in range(5) for name in ("augment", "shuffle") for epoch in range(5)
    }
    assert len(seeds) == 50
    assert all(0 <= seed < 2**62 for seed in seeds)
    assert derive_seed(0, "shuffle") == 4003579409339643648


def alternating(epoch: int, **changes: int) -> Tensor:
    augment = CropFlip(SIZE, 0, CPU, **{"padding": 0, "alternate": True} | changes)
    augment.set_epoch(epoch)
    return augment(IMAGES, torch.arange(SIZE))


def test_alternating_flips_show_each_image_both_ways_in_two_epochs():
    first, second, third = (alternating(epoch) for epoch in range(3))
    assert torch.equal(second, first.flip(3))
    assert torch.equal(third, first)
    flipped = (first != IMAGES).flatten(1).any(1)
    assert 0.35 < flipped.float().mean() < 0.65


def test_beyond_the_edges_alternating_crops_mirror_the_image():
    got = alternating(0, padding=2)
    assert got.min() >= 1, "the images have no black pixel, and so no padding is"
    padded = torch.nn.functional.pad(IMAGES, (2, 2, 2, 2), "reflect")
    crops = [padded[:, :, r : r + 32, c : c + 32] for r in range(5) for c in range(5)]
    found = sum((got == view).flatten(1).all(1).int() for crop in crops for view in (crop, crop.flip(3)))
    assert (found >= 1).all()
    assert (got != IMAGES).flatten(1).any(1).float().mean() > 0.9


def test_cutout_blanks_one_square_clipped_at_the_edges():
    augment = CropFlip(SIZE, 0, CPU, padding=0, cutout=12)
    white = torch.full_like(IMAGES, 255)
    blank = (augment(white, torch.arange(SIZE)) == 128).all(1)
    sides = blank.any(2).sum(1), blank.any(1).sum(1)
    assert torch.equal(blank.flatten(1).sum(1), sides[0] * sides[1]), "a rectangle"
    assert max(sides[0].max(), sides[1].max()) == 12
    assert min(sides[0].min(), sides[1].min()) >= 6
    assert blank.any(0).all(), "any pixel may be blank"
