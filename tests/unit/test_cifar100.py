"""CIFAR-100: files of its format, for the real archive is not among the test data."""

import hashlib
import io
import pickle
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from torchvision.datasets import CIFAR100

from cifar.datasets import DATASETS, PREPARE, cifar10
from cifar.errors import UserError
from tests.helpers.http_server import Server, serves
from tests.helpers.processes import records, result, torchrun

FOLDER = cifar10.CIFAR100.folder
NAMES = [f"class {i}" for i in range(100)]


def small_files(train: int = 200, test: int = 100) -> dict[str, bytes]:
    """Return the content of files like CIFAR-100's, by name."""
    random = np.random.default_rng(0)
    files = {"meta": {"fine_label_names": NAMES, "coarse_label_names": [f"group {i}" for i in range(20)]}}
    for name, count in (("train", train), ("test", test)):
        fine = (np.arange(count) % 100).tolist()
        files[name] = {
            "data": random.integers(256, size=(count, 3072), dtype=np.uint8),
            "fine_labels": fine,
            "coarse_labels": [label // 5 for label in fine],
            "filenames": [f"{name}_{i}.png" for i in range(count)],
            "batch_label": f"{name} batch 1 of 1",
        }
    return {name: pickle.dumps(content) for name, content in files.items()}


FILES = small_files()


@pytest.fixture
def small(monkeypatch):
    """Let the small files count as CIFAR-100; return them as an archive."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz", compresslevel=1) as tar:
        for name, data in FILES.items():
            entry = tarfile.TarInfo(f"{FOLDER}/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    md5 = {name: hashlib.md5(data).hexdigest() for name, data in FILES.items()}
    for name in ("train", "test"):
        monkeypatch.setattr(CIFAR100, f"{name}_list", [[name, md5[name]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": md5["meta"]})
    archive = content.getvalue()
    changed = replace(cifar10.CIFAR100, size=len(archive), sha256=hashlib.sha256(archive).hexdigest())
    monkeypatch.setattr(cifar10, "CIFAR100", changed)
    return archive


def test_downloaded_unpacked_and_read(small, tmp_path):
    """The labels are the fine ones, the names those of the archive."""
    with Server() as server:
        PREPARE["cifar100"](tmp_path, server.plays("/mine", serves(small)))
    data = DATASETS["cifar100"](tmp_path)
    data.check("cifar100")
    assert data.classes == tuple(NAMES)
    for name, (images, labels) in (("train", data.train), ("test", data.test)):
        expected = pickle.loads(FILES[name])
        assert images.flatten(1).tolist() == expected["data"].tolist()
        assert labels.tolist() == expected["fine_labels"]


def test_corrupt_directory_is_named(small, tmp_path):
    folder = tmp_path / FOLDER
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    (folder / "test").write_bytes(FILES["test"][:-1])
    with pytest.raises(UserError, match=f"^a file in {folder} is missing or corrupt: .* CIFAR-100 again$"):
        DATASETS["cifar100"](tmp_path)


def test_nothing_stands_in_for_it(small, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "CIFAR100", replace(cifar10.CIFAR100, urls=()))
    with pytest.raises(UserError, match=r"^CIFAR-100 is not available: .* copy the directory cifar-100-python"):
        PREPARE["cifar100"](tmp_path, None)


SCRIPT = """
import hashlib, pathlib
from torchvision.datasets import CIFAR100
from cifar.command import exit_on_error
from train_ddp import main

folder = pathlib.Path("data/cifar-100-python")
md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
CIFAR100.train_list, CIFAR100.test_list = [["train", md5["train"]]], [["test", md5["test"]]]
CIFAR100.meta = CIFAR100.meta | {"md5": md5["meta"]}
with exit_on_error("train_ddp.py"):
    main()
"""


@pytest.mark.slow
def test_training(tmp_path):
    """From the files to the report, at one process and at two, with the same losses."""
    folder = tmp_path / "data" / FOLDER
    folder.mkdir(parents=True)
    for name, data in small_files(train=2_000, test=1_001).items():
        (folder / name).write_bytes(data)
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    flags = ["--dataset", "cifar100", "--data-dir", "data", "--global-batch-size", 8, "--epochs", 1, "--log-steps", 50]
    for processes in (1, 2):
        batch = ["--local-batch-size", 8 // processes, "--run-dir", f"run{processes}"]
        done = torchrun(processes, *flags, *batch, cwd=tmp_path, script=[script])
        assert done.returncode == 0, done.stderr
        assert f"cifar100, from {tmp_path}/data: 2,000 training, 1,001 test, 100 classes" in done.stdout
        assert done.stdout.count("Accuracy for class: ") == 20
        outcome = result(tmp_path / f"run{processes}")
        assert (outcome["dataset"], outcome["test_total"]) == ("cifar100", 1_001)
        assert (tmp_path / f"run{processes}" / "report.png").exists()
    one, two = (records(tmp_path / name, "train/loss") for name in ("run1", "run2"))
    assert [step for step, _ in one] == [step for step, _ in two] == [50, 100, 150, 200, 250]
    assert [loss for _, loss in one] == pytest.approx([loss for _, loss in two], rel=1e-5)
