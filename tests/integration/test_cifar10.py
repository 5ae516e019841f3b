"""The real CIFAR-10."""

import hashlib
import tarfile
from dataclasses import replace

import pytest
import torch

from cifar.datasets import cifar10
from cifar.datasets.cifar10 import load_cifar10, prepare_cifar10
from tests.helpers.http_server import Server, serves

pytestmark = pytest.mark.slow


def test_from_the_server_to_the_tensors(real_data, tmp_path, monkeypatch):
    """What is loaded is what torchvision itself reads."""
    from torchvision.datasets import CIFAR10

    path, data_dir = tmp_path / "packed.tar.gz", tmp_path / "data"
    with tarfile.open(path, "w:gz", compresslevel=0) as tar:
        tar.add(real_data / CIFAR10.folder, CIFAR10.folder)
    content = path.read_bytes()
    with Server() as server:
        changed = replace(
            cifar10.CIFAR10,
            size=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            urls=(server.plays("/a", serves(content)),),
        )
        monkeypatch.setattr(cifar10, "CIFAR10", changed)
        prepare_cifar10(data_dir, None)
    assert [path.name for path in data_dir.iterdir() if path.name != ".cifar-10.lock"] == [CIFAR10.folder]
    data = load_cifar10(data_dir)
    data.check("cifar10")
    for (images, labels), train in ((data.train, True), (data.test, False)):
        theirs = CIFAR10(real_data, train=train)
        assert torch.equal(images.permute(0, 2, 3, 1), torch.from_numpy(theirs.data))
        assert labels.tolist() == theirs.targets
