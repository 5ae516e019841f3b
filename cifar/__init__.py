"""Distributed training on CIFAR-10; see train_ddp.py."""

__version__ = "0.2.0"
