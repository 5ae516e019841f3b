"""CIFAR-10, small: download, unpack, verify and read it, and the message when it is not available."""

import hashlib
import os
import pickle
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from cifar.datasets import cifar10
from cifar.datasets.cifar10 import CLASSES, load_cifar10, prepare_cifar10
from cifar.datasets.download import UnavailableError
from cifar.errors import UserError
from tests.helpers.http_server import Exchange, Reply, Server, says, serves

BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
ARCHIVE, FOLDER = cifar10.CIFAR10.name, cifar10.CIFAR10.folder


def small_files() -> dict[str, bytes]:
    """Return the content of files like CIFAR-10's, with four images in each batch."""
    random = np.random.default_rng(0)
    files = {"batches.meta": pickle.dumps({"label_names": list(CLASSES)})}
    for name in BATCHES:
        images = random.integers(256, size=(4, 3072), dtype=np.uint8)
        files[name] = pickle.dumps({"data": images, "labels": random.integers(10, size=4).tolist()})
    return files


FILES = small_files()
UNPACKED = {FOLDER: None} | {f"{FOLDER}/{name}": content for name, content in FILES.items()}


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """An archive of the small files, in a directory that is not the data directory. It counts as CIFAR-10 here."""
    folder = tmp_path / "elsewhere" / FOLDER
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    path = folder.parent / ARCHIVE
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        tar.add(folder, FOLDER)
    expect(monkeypatch, path.read_bytes())
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in FILES.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5[name]] for name in BATCHES[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [[name, md5[name]] for name in BATCHES[5:]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"]})
    return path


def expect(monkeypatch, content: bytes, *urls: str) -> None:
    changed = replace(cifar10.CIFAR10, size=len(content), sha256=hashlib.sha256(content).hexdigest(), urls=urls)
    monkeypatch.setattr(cifar10, "CIFAR10", changed)


@pytest.fixture
def server():
    with Server() as running:
        yield running


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.fixture
def unpacked(archive, data_dir):
    """The data directory with the small files in place."""
    (archive.parent / FOLDER).rename(data_dir / FOLDER)
    return data_dir


def state(folder: Path) -> dict[str, bytes | None]:
    """Return every file under `folder` with its content, and every directory; not the lock file."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.name != ".cifar-10.lock"}
    return {name: path.read_bytes() if path.is_file() else None for name, path in found.items()}


def prepare(data_dir: Path, data_url: str | None = None) -> None:
    prepare_cifar10(data_dir, data_url)


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_downloaded_unpacked_and_read(archive, server, tmp_path, monkeypatch):
    """--data-url first, then the built-in sources, into a directory that does not exist yet."""
    content = archive.read_bytes()
    expect(monkeypatch, content, server.plays("/first", says(404)), server.plays("/second", serves(content)))
    data_dir = tmp_path / "new" / "data"
    prepare(data_dir, server.plays("/mine", says(503)))
    assert state(data_dir) == UNPACKED
    assert server.paths == ["/mine", "/first", "/second"]
    prepare(data_dir)
    assert len(server.exchanges) == 3

    data = load_cifar10(data_dir)
    data.check("cifar10")
    assert data.classes == CLASSES
    for (images, labels), names in ((data.train, BATCHES[:5]), (data.test, BATCHES[5:])):
        batches = [pickle.loads(FILES[name]) for name in names]
        assert images.is_contiguous()
        assert images.flatten(1).tolist() == np.concatenate([batch["data"] for batch in batches]).tolist()
        assert labels.tolist() == [label for batch in batches for label in batch["labels"]]


def test_unverified_archive_is_not_opened(archive, server, data_dir, monkeypatch):
    content = archive.read_bytes()
    expect(monkeypatch, content, server.plays("/a", says(200, content)))
    monkeypatch.setattr(cifar10, "CIFAR10", replace(cifar10.CIFAR10, sha256="0" * 64))
    monkeypatch.setattr(tarfile, "open", None)
    with pytest.raises(UserError, match="SHA-256"):
        prepare(data_dir)
    assert state(data_dir) == {}
    (data_dir / ARCHIVE).write_bytes(content)
    with pytest.raises(UserError, match="SHA-256"):
        prepare(data_dir)


def test_concurrent_launches_download_once(archive, server, data_dir, monkeypatch):
    """The second launch waits for the download of the first."""
    content, both = archive.read_bytes(), threading.Event()

    def rest_later(reply: Reply) -> None:
        both.wait(20)
        reply.body(content[1000:])

    expect(monkeypatch, content, server.plays("/a", serves(content, upto=1000, then=rest_later)))
    said: list[str] = []
    monkeypatch.setattr("builtins.print", lambda text, **_: said.append(text) or (len(said) == 2 and both.set()))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: prepare_cifar10(data_dir, None), range(2)))
    assert {text.split()[0] for text in said[:2]} == {"downloading", "waiting"}
    assert server.exchanges == [Exchange("/a", None, len(content))]
    assert state(data_dir) == UNPACKED


def test_archive_in_the_data_directory(archive, data_dir):
    """It is used and kept."""
    content = archive.read_bytes()
    (data_dir / ARCHIVE).write_bytes(content)
    (data_dir / ".cifar-10-killed" / FOLDER).mkdir(parents=True)  # what a killed process has left
    prepare(data_dir)
    assert state(data_dir) == UNPACKED | {ARCHIVE: content}


@pytest.mark.parametrize("damage", [flip, lambda path: path.write_bytes(path.read_bytes()[:-100])])
def test_corrupt_archive_is_named_and_kept(archive, data_dir, damage):
    copy = data_dir / ARCHIVE
    copy.write_bytes(archive.read_bytes())
    damage(copy)
    before = state(data_dir)
    with pytest.raises(UserError, match=f"^{copy} is corrupt or incomplete: .*; move it away to download it again$"):
        prepare(data_dir)
    assert state(data_dir) == before


def test_full_disk_unpacks_nothing(archive, data_dir, monkeypatch):
    """It is not called corruption, and a later launch succeeds."""
    content, copy = archive.read_bytes(), tarfile.copyfileobj
    (data_dir / ARCHIVE).write_bytes(content)

    def full(source, target, *args: object, **kwargs: object) -> None:
        if target.name.endswith("data_batch_3"):
            raise OSError(28, "No space left on device")
        copy(source, target, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "copyfileobj", full)
        with pytest.raises(UnavailableError, match=r"cannot be put there \(\[Errno 28\] No space left on device\)"):
            prepare(data_dir)
    assert state(data_dir) == {ARCHIVE: content}
    prepare(data_dir)
    assert state(data_dir) == UNPACKED | {ARCHIVE: content}


def test_existing_directory_is_not_touched(unpacked):
    """It may be on a read-only file system: not even the lock file is created."""
    (unpacked / ARCHIVE).write_bytes(b"not read")
    before = {path: os.stat(path).st_mtime_ns for path in [unpacked, *unpacked.rglob("*")]}
    prepare(unpacked)
    load_cifar10(unpacked)
    assert {path: os.stat(path).st_mtime_ns for path in [unpacked, *unpacked.rglob("*")]} == before


@pytest.mark.parametrize("damage", [flip, Path.unlink])
@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches.meta"])
def test_corrupt_directory_is_named(unpacked, name, damage):
    damage(unpacked / FOLDER / name)
    with pytest.raises(UserError) as caught:
        load_cifar10(unpacked)
    assert str(caught.value) == (
        f"a file in {unpacked / FOLDER} is missing or corrupt: delete the directory to download CIFAR-10 again"
    )


def test_unverified_file_is_not_unpickled(unpacked):
    """A pickle may run anything."""
    trace = unpacked / "ran"
    (unpacked / FOLDER / "data_batch_1").write_bytes(b"cpathlib\nPath.touch\n(cpathlib\nPath\n(V%btRtR." % bytes(trace))
    with pytest.raises(UserError, match="corrupt"):
        load_cifar10(unpacked)
    assert not trace.exists()


def test_unreadable_file_is_named(unpacked, monkeypatch):
    """Simulated, since root may read every file."""
    path = unpacked / FOLDER / "data_batch_2"

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("torchvision.datasets.utils.calculate_md5", denied)
    with pytest.raises(UserError, match=f"^cannot read {path}: Permission denied$"):
        load_cifar10(unpacked)


def test_not_available(archive, server, data_dir, monkeypatch):
    """One line: which sources failed, why, and three ways out."""
    built_in, mine = server.plays("/built-in", says(500)), server.plays("/mine", says(404))
    expect(monkeypatch, archive.read_bytes(), built_in)
    reason = (
        f"it is not in {data_dir} and cannot be put there "
        f"({mine}: HTTP Error 404: Not Found; {built_in}: HTTP Error 500: Internal Server Error)"
    )
    with pytest.raises(UnavailableError) as caught:
        prepare(data_dir, mine)
    assert caught.value.reason == reason
    assert str(caught.value) == (
        f"CIFAR-10 is not available: {reason}; name a mirror with --data-url URL, copy the directory {FOLDER} or the "
        f"file {ARCHIVE} into {data_dir}, or use the synthetic dataset with --dataset synthetic"
    )
    assert state(data_dir) == {}


@pytest.mark.parametrize("obstacle", ["a file", "read-only"])
def test_directory_that_cannot_be_written(archive, tmp_path, monkeypatch, obstacle):
    data_dir = tmp_path / "data"
    if obstacle == "a file":
        data_dir.write_text("in the way")
    else:

        def read_only(*_: object, **__: object) -> None:
            raise OSError(30, "Read-only file system", str(data_dir))

        monkeypatch.setattr("filelock.FileLock.acquire", read_only)
    with pytest.raises(
        UnavailableError, match=r"^CIFAR-10 is not available: .* cannot be put there .*--data-url"
    ) as caught:
        prepare(data_dir)
    assert caught.value.reason.startswith(f"it is not in {data_dir} and cannot be put there ([Errno ")
