"""Distributed training on CIFAR-10; see train_ddp.py."""

import sys

__version__ = "0.2.0"

if sys.platform == "win32":
    raise SystemExit("cifar-ddp runs on Linux and macOS: on Windows, use it in WSL (the Windows Subsystem for Linux)")
