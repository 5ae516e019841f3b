"""Run train_ddp.py on a small synthetic dataset: python -m tests.helpers.small FLAGS, also under torchrun."""

from cifar.cli import exit_on_error
from cifar.datasets import synthetic
from train_ddp import main

TRAIN_SIZE, TEST_SIZE = 2_000, 1_001  # an odd test set, so that the shards of two ranks differ in size

if __name__ == "__main__":
    synthetic.TRAIN_SIZE, synthetic.TEST_SIZE = TRAIN_SIZE, TEST_SIZE
    with exit_on_error("train_ddp.py"):
        main()
