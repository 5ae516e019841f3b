"""Run train_ddp.py on a small synthetic dataset, without a report; also under torchrun: -m tests.helpers.small FLAGS"""

import sys
from types import SimpleNamespace

from cifar.command import exit_on_error
from cifar.datasets import synthetic
from train_ddp import main

TRAIN_SIZE, TEST_SIZE = 2_000, 1_001  # an odd test set, so that the shards of two ranks differ in size


def shrink() -> None:
    """Make the synthetic dataset of this process small, and leave out its reports."""
    synthetic.TRAIN_SIZE, synthetic.TEST_SIZE = TRAIN_SIZE, TEST_SIZE
    sys.modules["cifar.records.report"] = SimpleNamespace(write_report=lambda *_: None)  # type: ignore[assignment]


if __name__ == "__main__":
    shrink()
    with exit_on_error("train_ddp.py"):
        main()
