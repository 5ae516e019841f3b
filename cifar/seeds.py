"""Randomness as a function: seeds made from what they are for, so that nothing has to be saved or kept in step."""

import hashlib

import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 62-bit seed of its own for each (seed, purpose), e.g. `derive_seed(0, "augment", epoch)`."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator seeded for this purpose; its numbers are the same on every machine and rank."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))
