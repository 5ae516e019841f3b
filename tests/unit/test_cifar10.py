"""CIFAR-10 and CIFAR-100, small: download, unpack, verify and read them, and the message when one is not available."""

import hashlib
import io
import os
import pickle
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torchvision

from cifar.config import TrainConfig
from cifar.datasets import DATASETS, PREPARE, cifar10
from cifar.datasets.cifar10 import CLASSES, load_cifar10
from cifar.datasets.download import UnavailableError
from cifar.errors import UserError
from tests.helpers.checkpoints import flip_bit
from tests.helpers.http_server import Reply, says, serves

BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
ARCHIVE, FOLDER = cifar10.CIFAR10.name, cifar10.CIFAR10.folder


def small_cifar10() -> dict[str, dict]:
    """Return the content of files like CIFAR-10's, with four images in each batch."""
    random = np.random.default_rng(0)
    files: dict[str, dict] = {"batches.meta": {"label_names": [f"long {name}" for name in CLASSES]}}
    for name in BATCHES:
        images = random.integers(256, size=(4, 3072), dtype=np.uint8)
        files[name] = {"data": images, "labels": random.integers(10, size=4).tolist()}
    return files


def count_as(monkeypatch, name: str, contents: dict[str, dict]) -> bytes:
    """Let these files count as the dataset CIFAR10 or CIFAR100; return them as an archive, which no source serves."""
    archive, reader = getattr(cifar10, name), getattr(torchvision.datasets, name)
    packed, md5 = io.BytesIO(), {}
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as tar:
        for file, content in contents.items():
            data = pickle.dumps(content)
            md5[file] = hashlib.md5(data).hexdigest()
            entry = tarfile.TarInfo(f"{archive.folder}/{file}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    for split in ("train_list", "test_list"):
        monkeypatch.setattr(reader, split, [[file, md5[file]] for file, _ in getattr(reader, split)])
    monkeypatch.setattr(reader, "meta", reader.meta | {"md5": md5[reader.meta["filename"]]})
    digest = hashlib.sha256(packed.getvalue()).hexdigest()
    changed = replace(archive, size=len(packed.getvalue()), sha256=digest, urls=())
    monkeypatch.setattr(cifar10, name, changed)
    return packed.getvalue()


def set_sources(monkeypatch, *urls: str) -> None:
    monkeypatch.setattr(cifar10, "CIFAR10", replace(cifar10.CIFAR10, urls=urls))


def prepare_cifar10(data_dir: Path, data_url: str | None) -> None:
    PREPARE["cifar10"](TrainConfig(data_dir=data_dir, data_url=data_url))


@pytest.fixture
def archive(monkeypatch) -> bytes:
    return count_as(monkeypatch, "CIFAR10", small_cifar10())


@pytest.fixture
def unpacked(archive, tmp_path):
    """The data directory with the small files in place."""
    (tmp_path / ARCHIVE).write_bytes(archive)
    prepare_cifar10(tmp_path, None)
    return tmp_path


def names(data_dir: Path) -> set[str]:
    return {path.name for path in data_dir.iterdir()} - {".cifar-10.lock"}


def test_cifar10_downloaded_unpacked_and_read(archive, server, tmp_path, monkeypatch):
    """--data-url first, then the built-in sources, into a directory that does not exist yet."""
    set_sources(monkeypatch, server.plays("/first", says(404)), server.plays("/second", serves(archive)))
    data_dir = tmp_path / "new" / "data"
    for _ in range(2):
        prepare_cifar10(data_dir, server.plays("/mine", says(503)))
        assert names(data_dir) == {FOLDER}
        assert [path for path, _ in server.requests] == ["/mine", "/first", "/second"]
    data, files = load_cifar10(data_dir), small_cifar10()
    data.check("cifar10")
    assert data.classes == CLASSES
    for (images, labels), batches in ((data.train, BATCHES[:5]), (data.test, BATCHES[5:])):
        assert images.is_contiguous()
        assert images.flatten(1).tolist() == np.concatenate([files[name]["data"] for name in batches]).tolist()
        assert labels.tolist() == [label for name in batches for label in files[name]["labels"]]


def test_cifar100_downloaded_unpacked_and_read(server, tmp_path, monkeypatch):
    """The labels are the fine ones, the names those of the archive."""
    names, random = [f"class {i}" for i in range(100)], np.random.default_rng(0)
    files: dict[str, dict] = {"meta": {"fine_label_names": names, "coarse_label_names": ["group"]}}
    for split in ("train", "test"):
        images = random.integers(256, size=(100, 3072), dtype=np.uint8)
        files[split] = {"data": images, "fine_labels": list(range(100)), "coarse_labels": [0] * 100}
    packed = count_as(monkeypatch, "CIFAR100", files)
    config = TrainConfig(data_dir=tmp_path, data_url=server.plays("/mine", serves(packed)))
    PREPARE["cifar100"](config)
    data = DATASETS["cifar100"](config)
    data.check("cifar100")
    assert data.classes == tuple(names)
    for split, (images, labels) in (("train", data.train), ("test", data.test)):
        assert images.flatten(1).tolist() == files[split]["data"].tolist()
        assert labels.tolist() == files[split]["fine_labels"]


def test_concurrent_launches_download_once(archive, server, tmp_path, monkeypatch):
    """The second launch waits for the download of the first."""
    both = threading.Event()

    def rest_later(reply: Reply) -> None:
        both.wait(20)
        reply.wfile.write(archive[1000:])

    set_sources(monkeypatch, server.plays("/a", serves(archive, upto=1000, then=rest_later)))
    said: list[str] = []
    monkeypatch.setattr("builtins.print", lambda text, **_: said.append(text) or (len(said) == 2 and both.set()))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: prepare_cifar10(tmp_path, None), range(2)))
    assert {text.split()[0] for text in said[:2]} == {"downloading", "waiting"}
    assert server.requests == [("/a", 0)]
    assert names(tmp_path) == {FOLDER}


def test_archive_in_the_data_directory(archive, tmp_path):
    """It is used and kept; a corrupt one is named and kept, but not opened."""
    file = tmp_path / ARCHIVE
    for wrong in (archive[:-100], archive + bytes(1)):  # of which gzip would open the second
        file.write_bytes(wrong)
        with pytest.raises(UserError) as caught:
            prepare_cifar10(tmp_path, None)
        assert str(caught.value) == f"{file} is corrupt or incomplete: move it away to download it again"
        assert (names(tmp_path), file.read_bytes()) == ({ARCHIVE}, wrong)
    file.write_bytes(archive)
    (tmp_path / ".cifar-10.tmp" / FOLDER / "test_batch").mkdir(parents=True)  # of a process that was killed
    prepare_cifar10(tmp_path, None)
    assert names(tmp_path) == {FOLDER, ARCHIVE}
    load_cifar10(tmp_path)


def test_full_disk_unpacks_nothing(archive, tmp_path, monkeypatch):
    """It is not called corruption, and a later launch succeeds."""
    (tmp_path / ARCHIVE).write_bytes(archive)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(tarfile, "copyfileobj", fail)
        with pytest.raises(UnavailableError, match=r"cannot be put there \(\[Errno 28\] No space left on device\)"):
            prepare_cifar10(tmp_path, None)
    assert names(tmp_path) == {ARCHIVE}
    prepare_cifar10(tmp_path, None)
    load_cifar10(tmp_path)


@pytest.mark.parametrize("named", [".", "cifar-10-batches-py"])
def test_existing_directory_is_not_touched(unpacked, named):
    """It may be on a read-only file system: not even the lock file is created."""
    (unpacked / ".cifar-10.lock").unlink()
    (unpacked / ARCHIVE).write_bytes(b"not read")
    before = {path: os.stat(path).st_mtime_ns for path in [unpacked, *unpacked.rglob("*")]}
    prepare_cifar10(unpacked / named, None)
    load_cifar10(unpacked / named)
    assert {path: os.stat(path).st_mtime_ns for path in [unpacked, *unpacked.rglob("*")]} == before


def make_hostile(path: Path) -> None:
    """Write a pickle that creates a file beside it."""
    path.write_bytes(b"cpathlib\nPath.touch\n(cpathlib\nPath\n(V%btRtR." % bytes(path.with_name("ran")))


@pytest.mark.parametrize("damage", [flip_bit, Path.unlink, make_hostile])
@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches.meta"])
def test_corrupt_file_is_named_and_not_unpickled(unpacked, name, damage):
    folder = unpacked / FOLDER
    damage(folder / name)
    with pytest.raises(UserError) as caught:
        load_cifar10(unpacked)
    reason = "is missing or corrupt: delete the directory to download CIFAR-10 again"
    assert str(caught.value) == f"a file in {folder} {reason}"
    assert not (folder / "ran").exists()


def test_not_available(archive, server, tmp_path, monkeypatch):
    """One line: which sources failed, why, and three ways out."""
    built_in, mine = server.plays("/built-in", says(500)), server.plays("/mine", says(404))
    set_sources(monkeypatch, built_in)
    with pytest.raises(UnavailableError) as caught:
        prepare_cifar10(tmp_path, mine)
    assert str(caught.value) == (
        f"CIFAR-10 is not in {tmp_path} and cannot be put there "
        f"({mine}: HTTP Error 404: Not Found; {built_in}: HTTP Error 500: Internal Server Error): name a mirror with "
        f"--data-url URL, copy the directory {FOLDER} or the file {ARCHIVE} there, or use --dataset synthetic"
    )
    assert names(tmp_path) == set()
