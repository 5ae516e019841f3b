"""The real CIFAR-10."""

import hashlib
import tarfile
from dataclasses import replace

import pytest
import torch

from cifar.datasets import cifar10
from cifar.datasets.download import prepare
from tests.helpers.http_server import Server, serves


@pytest.mark.slow
def test_from_the_server_to_the_tensors(real_data, tmp_path, monkeypatch):
    """What is loaded is what torchvision itself reads."""
    from torchvision.datasets import CIFAR10

    path, folder = tmp_path / "packed.tar.gz", cifar10.CIFAR10.folder
    with tarfile.open(path, "w:gz", compresslevel=0) as tar:
        tar.add(real_data / folder, folder)
    content = path.read_bytes()
    changed = replace(cifar10.CIFAR10, size=len(content), sha256=hashlib.sha256(content).hexdigest(), urls=())
    monkeypatch.setattr(cifar10, "CIFAR10", changed)
    with Server() as server:
        prepare(cifar10.CIFAR10, tmp_path / "data", server.plays("/a", serves(content)))
    data = cifar10.load_cifar10(tmp_path / "data")
    for (images, labels), train in ((data.train, True), (data.test, False)):
        theirs = CIFAR10(real_data, train=train)
        assert torch.equal(images.permute(0, 2, 3, 1), torch.from_numpy(theirs.data))
        assert labels.tolist() == theirs.targets
