"""The real CIFAR-10."""

import hashlib
import sys
import tarfile
import textwrap
from dataclasses import replace

import pytest
import torch

from cifar.datasets import cifar10
from cifar.datasets.cifar10 import ARCHIVE, load_cifar10, prepare_cifar10
from tests.helpers.http_server import Server, serves
from tests.helpers.processes import run

pytestmark = pytest.mark.slow


def test_from_the_server_to_the_tensors(real_data, tmp_path, monkeypatch):
    """What is loaded is what torchvision itself reads."""
    from torchvision.datasets import CIFAR10

    path, data_dir = tmp_path / "packed.tar.gz", tmp_path / "data"
    with tarfile.open(path, "w:gz", compresslevel=0) as tar:
        tar.add(real_data / ARCHIVE.folder, ARCHIVE.folder)
    content = path.read_bytes()
    with Server() as server:
        changed = replace(
            cifar10.ARCHIVE,
            size=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            urls=(server.plays("/a", serves(content)),),
        )
        monkeypatch.setattr(cifar10, "ARCHIVE", changed)
        prepare_cifar10(data_dir, None)
    assert [path.name for path in data_dir.iterdir() if path.name != ".cifar-10.lock"] == [ARCHIVE.folder]
    data = load_cifar10(data_dir)
    data.check("cifar10")
    for (images, labels), train in ((data.train, True), (data.test, False)):
        theirs = CIFAR10(real_data, train=train)
        assert torch.equal(images.permute(0, 2, 3, 1), torch.from_numpy(theirs.data))
        assert labels.tolist() == theirs.targets


def test_torchvision_without_its_operators(real_data, tmp_path):
    """CIFAR-10 loads where `import torchvision` fails because its compiled part does not fit this torch."""
    program = textwrap.dedent(f"""
        import gc
        from pathlib import Path
        import torch

        def fails(path):
            raise OSError(f"Could not load this library: {{path}}")

        torch.ops.load_library = fails
        try:
            import torchvision
        except RuntimeError as error:
            print(error)

        from cifar.datasets.cifar10 import load_cifar10

        data = load_cifar10(Path({str(real_data.resolve())!r}))
        print(tuple(data.train[0].shape), len(data.test[1]))
        gc.collect()
        print(len(torch._C._jit_get_schemas_for_operator("torchvision::nms")))
    """)
    done = run([sys.executable, "-c", program], cwd=tmp_path)
    assert done.stdout.splitlines() == [
        "operator torchvision::nms does not exist",
        "(50000, 3, 32, 32) 10000",
        "1",  # still declared: an operator goes when the object that declared it does
    ], done.stderr
