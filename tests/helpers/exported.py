"""Run an exported model with the guides' own code."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import onnxruntime
import safetensors
import torch
from torch import Tensor

import cifar.data
import cifar.models
from tests.helpers.processes import ROOT

NAME = "step-00050000"  # of the file in the guides, without its suffix
GUIDES = {"pt2": "README.md", "onnx": "cifar/README.md", "safetensors": "cifar/README.md"}


def follow(format_: str, folder: Path, images: Tensor) -> tuple[Tensor, list[str]]:
    """Follow the guides in `folder`, which holds the file; return scores, float32 [n, classes], and class names.

    Args:
        images: uint8 [n, 3, 32, 32].
    """
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / GUIDES[format_]).read_text(), re.M | re.S)
    (code,) = (block for block in blocks if f'"{NAME}.{format_}"' in block)
    scope: dict[str, Any] = {"json": json, "torch": torch, "onnxruntime": onnxruntime, "safetensors": safetensors}
    scope |= {"cifar": cifar, "images": images.numpy() if format_ == "onnx" else images}
    with contextlib.chdir(folder):
        exec(code, scope)
    return torch.as_tensor(scope["scores"]), scope["classes"]
