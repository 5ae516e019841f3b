"""The check that every dataset has to pass, and the synthetic dataset: the same bytes on every machine."""

import hashlib
from dataclasses import replace

import pytest
import torch

from cifar.datasets.base import Dataset
from cifar.datasets.synthetic import make_synthetic
from cifar.errors import UserError

IMAGES = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
LABELS = torch.tensor([0, 1, 2, 0])
GOOD = Dataset(("ant", "bee", "cat"), (IMAGES, LABELS), (IMAGES[:1], LABELS[:1]))
IMAGES_MUST = "images must be torch.uint8 [n, 3, 32, 32], with n > 0, not "


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"classes": ("ant", "", "cat")}, "the class names must be non-empty and unique, not ('ant', '', 'cat')"),
        ({"classes": ("ant", "bee", "ant")}, "the class names must be non-empty and unique, not ('ant', 'bee', 'ant')"),
        ({"train": (IMAGES.float(), LABELS)}, f"training {IMAGES_MUST}torch.float32 [4, 3, 32, 32]"),
        ({"train": (IMAGES.permute(0, 2, 3, 1), LABELS)}, f"training {IMAGES_MUST}torch.uint8 [4, 32, 32, 3]"),
        ({"test": (IMAGES[:0], LABELS[:0])}, f"test {IMAGES_MUST}torch.uint8 [0, 3, 32, 32]"),
        ({"train": (IMAGES, LABELS.int())}, "training labels must be torch.int64 [4], not torch.int32 [4]"),
        ({"test": (IMAGES, LABELS[:3])}, "test labels must be torch.int64 [4], not torch.int64 [3]"),
        ({"train": (IMAGES, LABELS + 1)}, "training labels must be in [0, 2], one per class name, not in [1, 3]"),
        ({"test": (IMAGES, LABELS - 1)}, "test labels must be in [0, 2], one per class name, not in [-1, 1]"),
    ],
)
def test_wrong_dataset_is_refused(wrong, message):
    GOOD.check("good")
    with pytest.raises(UserError) as caught:
        replace(GOOD, **wrong).check("mine")
    assert str(caught.value) == f"dataset mine: {message}"


@pytest.mark.parametrize(
    ("other", "splits"),
    [
        ({"note": "words"}, set()),
        ({"train": (IMAGES.clone().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), LABELS)}, set()),
        ({"train": (IMAGES + (torch.arange(4) == 3).byte().view(4, 1, 1, 1), LABELS)}, {"training"}),
        ({"train": (IMAGES, (LABELS + 1) % 3)}, {"training"}),
        ({"test": (IMAGES[:2], LABELS[:2])}, {"test"}),
        ({"classes": ("ant", "bee", "dog")}, {"training", "test"}),
    ],
)
def test_fingerprint_tells_datasets_apart(other, splits):
    mine, theirs = GOOD.fingerprint, replace(GOOD, **other).fingerprint
    assert mine["training"].startswith("4 images, SHA-256 ")
    assert {split for split in mine if mine[split] != theirs[split]} == splits


def test_synthetic_bytes():
    """Every accuracy on the synthetic dataset depends on these. torch's generator neither determines nor moves."""
    state = torch.get_rng_state()
    made = make_synthetic()
    made.check("synthetic")
    assert torch.equal(torch.get_rng_state(), state)
    assert [hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in (*made.train, *made.test)] == [
        "de1cc4c7f6dd403919e8e735fe61436f0b85735fa919d024766693e783ed823f",
        "0564108d32ab7d6a9b64b6a12f45ae3ecf4dfd24fc00844ca7e0fc83d4b01a87",
        "a7a4be29fd1a4453baf34bbf0bbbd9ae06199f9f93af1296600f570313645fcb",
        "d44b31c1b2df81aef6bbe6207b31351954183c0e29cd92cf2c5ac3af51652dc4",
    ]
