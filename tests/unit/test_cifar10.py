"""Finding, fetching, unpacking and reading CIFAR-10, and what is said when it can't be had."""

import dataclasses
import hashlib
import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from cifar.datasets import cifar10
from cifar.datasets.cifar10 import FOLDER, load_cifar10, prepare_cifar10, unpack
from cifar.errors import UserError
from tests.helpers.processes import ROOT, clean_environment, run, train
from tests.test_download import Exchange, Server, ignores_range, says, serves

FILES = ["batches.meta", *(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
SMALL = {name: random.Random(name).randbytes(40_000) for name in FILES}
ARCHIVE = cifar10.ARCHIVE.name


def pack(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    """Write a .tar.gz of exactly these members."""
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def small_members() -> list[tuple[tarfile.TarInfo, bytes]]:
    """The members of an archive like the real one, only smaller."""
    return [(member(FOLDER, tarfile.DIRTYPE), b"")] + [
        (member(f"{FOLDER}/{name}"), content) for name, content in SMALL.items()
    ]


@pytest.fixture
def expect(monkeypatch):
    """Call it with an archive: that is CIFAR-10 now, and `urls` are where it is to be had."""

    def change(path: Path, *urls: str) -> None:
        content = path.read_bytes()
        changed = dataclasses.replace(
            cifar10.ARCHIVE, size=len(content), sha256=hashlib.sha256(content).hexdigest(), urls=urls
        )
        monkeypatch.setattr(cifar10, "ARCHIVE", changed)

    return change


@pytest.fixture
def small(tmp_path, expect):
    """A small archive in a folder of its own, which stands for CIFAR-10 and has no source."""
    (tmp_path / "elsewhere").mkdir()
    path = pack(tmp_path / "elsewhere" / ARCHIVE, small_members())
    expect(path)
    return path


@pytest.fixture
def server():
    with Server() as running:
        yield running


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def state(folder: Path) -> dict[str, bytes | None]:
    """Every file under `folder` with its content, and every folder; not the file that launches take turns by."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.name != ".cifar-10.lock"}
    return {name: path.read_bytes() if path.is_file() else None for name, path in sorted(found.items())}


def names_of(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name != ".cifar-10.lock"]


UNPACKED = {FOLDER: None} | {f"{FOLDER}/{name}": content for name, content in SMALL.items()}


def prepare(data_dir: Path, required: bool = True, data_url: str | None = None) -> str | None:
    return prepare_cifar10(data_dir, data_url, required, show=False)


# Downloaded


def test_downloaded_unpacked_and_cleaned_up(small, server, data_dir, expect):
    expect(small, server.plays("/first", says(404)), server.plays("/second", serves(small.read_bytes())))
    assert prepare(data_dir) is None
    assert state(data_dir) == UNPACKED
    assert server.paths == ["/first", "/second"]
    assert prepare(data_dir) is None
    assert len(server.exchanges) == 2


def test_makes_the_folder(small, server, tmp_path, expect):
    expect(small, server.plays("/a", serves(small.read_bytes())))
    assert prepare(tmp_path / "new" / "folder") is None
    assert state(tmp_path / "new" / "folder") == UNPACKED


def test_data_url_comes_first(small, server, data_dir, expect):
    expect(small, server.plays("/built-in", serves(small.read_bytes())))
    assert prepare(data_dir, data_url=server.plays("/mine", says(503))) is None
    assert server.paths == ["/mine", "/built-in"]


def test_unsafe_download_is_not_unpacked(tmp_path, server, data_dir, expect):
    path = pack(tmp_path / "evil", [*small_members(), (member("../evil.txt"), b"evil")])
    expect(path, server.plays("/a", serves(path.read_bytes())))
    with pytest.raises(UserError, match=r"'\.\./evil\.txt'"):
        prepare(data_dir)
    assert list(state(data_dir)) == [f"{ARCHIVE}.part"]
    assert not (tmp_path / "evil.txt").exists()


def test_wrong_download_is_never_unpacked(small, server, data_dir, expect, monkeypatch):
    """An archive of the right size, and sound but for its hash, isn't even opened."""
    expect(small, server.plays("/a", ignores_range(small.read_bytes())))
    monkeypatch.setattr(cifar10, "ARCHIVE", dataclasses.replace(cifar10.ARCHIVE, sha256="0" * 64))
    monkeypatch.setattr(tarfile, "open", None)
    with pytest.raises(UserError, match="SHA-256"):
        prepare(data_dir)
    assert state(data_dir) == {}


def test_real_archive_from_the_server_to_the_tensors(real_data, server, data_dir, tmp_path, expect, capsys):
    """The whole way, with the real files: what is loaded is what torchvision itself reads."""
    from torchvision.datasets import CIFAR10

    path = tmp_path / "packed.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=0) as tar:
        tar.add(real_data / FOLDER, FOLDER)
    expect(path, server.plays("/a", serves(path.read_bytes())))
    assert prepare(data_dir) is None
    assert names_of(data_dir) == [FOLDER]
    theirs = [CIFAR10(real_data, train=True), CIFAR10(real_data, train=False)]
    for (images, labels), own in zip(load_cifar10(data_dir), theirs, strict=True):
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert images.is_contiguous()
        assert images.shape == (len(own), 3, 32, 32)
        assert torch.equal(images.permute(0, 2, 3, 1), torch.from_numpy(own.data))
        assert labels.tolist() == own.targets
    assert capsys.readouterr() == ("", "")


def test_two_launches_at_once(small, server, data_dir):
    """The second waits for the first one's download instead of starting its own, then finds the files."""
    content = small.read_bytes()
    half, both_are_in = len(content) // 2, threading.Event()

    def the_rest_later(reply) -> None:
        both_are_in.wait(60)
        reply.body(content[half:])

    url = server.plays("/a", serves(content, upto=half, then=the_rest_later))
    program = textwrap.dedent(f"""
        import dataclasses, sys
        from pathlib import Path
        from cifar.datasets import cifar10

        digest = {hashlib.sha256(content).hexdigest()!r}
        cifar10.ARCHIVE = dataclasses.replace(cifar10.ARCHIVE, size={len(content)}, sha256=digest, urls=({url!r},))
        print("reason:", cifar10.prepare_cifar10(Path({str(data_dir)!r}), None, required=True), flush=True)
    """)

    def launch() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, env=clean_environment(), text=True, stdout=subprocess.PIPE
        )

    with launch() as first, launch() as second:
        try:
            lines = {process: process.stdout.readline() for process in (first, second)}  # type: ignore[union-attr]
            both_are_in.set()
            rest = {process: process.communicate(timeout=60)[0] for process in (first, second)}
        finally:
            both_are_in.set()
            first.kill()
            second.kill()
    assert sorted(line.split()[0] for line in lines.values()) == ["another", "downloading"]
    assert [said.splitlines()[-1] for said in rest.values()] == ["reason: None"] * 2
    assert server.exchanges == [Exchange("/a", None, len(content))]
    assert state(data_dir) == UNPACKED


# By hand


def test_archive_copied_by_hand(small, data_dir):
    """An archive beside the folder is used, and kept."""
    shutil.copy(small, data_dir)
    assert prepare(data_dir) is None
    assert state(data_dir) == UNPACKED | {ARCHIVE: small.read_bytes()}


def refused(data_dir: Path, message: str) -> None:
    """`prepare` names the archive, says `message`, and changes nothing, whether CIFAR-10 is required or not."""
    before = state(data_dir.parent)
    for required in (True, False):
        with pytest.raises(UserError, match=message) as caught:
            prepare(data_dir, required)
        assert str(data_dir / ARCHIVE) in str(caught.value)
    assert state(data_dir.parent) == before


def test_truncated_archive(small, data_dir):
    (data_dir / ARCHIVE).write_bytes(small.read_bytes()[:-1000])
    refused(data_dir, "damaged or incomplete")


def test_archive_with_a_flipped_byte(small, data_dir):
    (data_dir / ARCHIVE).write_bytes(flipped(small.read_bytes()))
    refused(data_dir, "SHA-256 is not that of CIFAR-10")


@pytest.mark.parametrize(
    "extra",
    [
        member("../evil"),
        member(f"{FOLDER}/../../evil"),
        member(f"{FOLDER}/.."),
        member("/evil"),
        member("evil"),
        member(f"{FOLDER}/deeper/evil"),
        member(f"{FOLDER}/deeper", tarfile.DIRTYPE),
        member(FOLDER),
        member(f"{FOLDER}/evil", tarfile.SYMTYPE, "/etc/passwd"),
        member(f"{FOLDER}/evil", tarfile.LNKTYPE, f"{FOLDER}/test_batch"),
        member(f"{FOLDER}/evil", tarfile.FIFOTYPE),
        member(f"{FOLDER}/evil", tarfile.CHRTYPE),
        member(FOLDER, tarfile.SYMTYPE, "/tmp"),
    ],
    ids=lambda info: f"{info.type.decode()}-{info.name}-{info.linkname}",
)
def test_unsafe_member(data_dir, expect, extra):
    """Right hash or not, anything but plain files in that one folder is refused before a byte is unpacked."""
    expect(pack(data_dir / ARCHIVE, [*small_members(), (extra, b"")]))
    refused(data_dir, f"holds {extra.name!r}")


def test_absolute_member(data_dir, tmp_path, expect):
    expect(pack(data_dir / ARCHIVE, [*small_members(), (member(str(tmp_path / "evil.txt")), b"evil")]))
    refused(data_dir, r"evil\.txt")


@pytest.mark.parametrize("damage", ["truncated", "garbled", "not an archive"])
def test_unpack_of_a_damaged_archive(small, data_dir, damage):
    """`unpack` on its own: all of it or nothing."""
    content = small.read_bytes()
    damaged = {
        "truncated": content[:-1000],
        "garbled": content[:100_000] + b"\xff" * 100_000 + content[200_000:],  # what zlib itself complains of
        "not an archive": b"hello" * 1000,
    }[damage]
    archive = data_dir / "some.tar.gz"
    archive.write_bytes(damaged)
    with pytest.raises(UserError, match=r"some\.tar\.gz can't be unpacked"):
        unpack(archive, data_dir)
    assert state(data_dir) == {"some.tar.gz": damaged}


# There already


def test_read_only_folder(small, data_dir, tmp_path):
    """Where the files are there, nothing is created, changed, or so much as opened for writing.

    Watched through Python's audit events, as a test that runs as root may write where it must not.
    """
    unpack(small, data_dir)
    (data_dir / ARCHIVE).write_bytes(b"not to be looked at")
    before = {path: os.stat(path).st_mtime_ns for path in [data_dir, *data_dir.rglob("*")]}
    data_dir.chmod(0o555)
    program = textwrap.dedent(f"""
        import os, sys
        from pathlib import Path
        from cifar.datasets.cifar10 import prepare_cifar10

        folder, writes = {str(data_dir)!r}, []

        def watch(event, args):
            if args and str(args[0]).startswith(folder):
                if event != "open" or args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                    if event not in ("os.listdir", "os.scandir"):
                        writes.append((event, args))

        sys.addaudithook(watch)
        print(prepare_cifar10(Path(folder), None, required=True), writes)
        writes.clear()
        open(folder + "-beside", "w").close()  # the watch is awake
        print(len(writes))
    """)
    try:
        done = run([sys.executable, "-c", program], cwd=tmp_path)
    finally:
        data_dir.chmod(0o755)
    assert done.stdout.splitlines() == ["None []", "1"], done.stderr
    assert {path: os.stat(path).st_mtime_ns for path in [data_dir, *data_dir.rglob("*")]} == before


def flipped(content: bytes) -> bytes:
    """`content` with one bit of the byte in its middle changed."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.fixture
def linked(real_data, data_dir):
    """The real files, by links that a test may replace."""
    (data_dir / FOLDER).mkdir()
    for name in FILES:
        (data_dir / FOLDER / name).symlink_to(real_data.resolve() / FOLDER / name)
    return data_dir


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_one_flipped_byte_is_named(linked, name):
    path = linked / FOLDER / name
    replace(path, flipped(path.read_bytes()))
    assert prepare(linked) is None
    with pytest.raises(UserError) as caught:
        load_cifar10(linked)
    assert str(caught.value).startswith(f"{path} is damaged")
    assert path.is_file()


@pytest.mark.parametrize("name", ["data_batch_5", "batches.meta"])
def test_missing_file_is_named(linked, name):
    (linked / FOLDER / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        load_cifar10(linked)


def test_nothing_unverified_is_unpickled(linked):
    """A pickle may run anything: one with the wrong checksum never gets to."""
    trace = linked / "ran"
    replace(linked / FOLDER / "data_batch_1", b"cpathlib\nPath.touch\n(cpathlib\nPath\n(V%btRtR." % bytes(trace))
    with pytest.raises(UserError, match="data_batch_1 is damaged"):
        load_cifar10(linked)
    assert not trace.exists()


def test_unreadable_file_is_named(linked, monkeypatch):
    """Stands in for a file without read permission, which a test that runs as root can't have."""
    path = linked / FOLDER / "data_batch_2"

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("torchvision.datasets.utils.calculate_md5", denied)
    with pytest.raises(UserError, match="data_batch_2 can't be read: Permission denied"):
        load_cifar10(linked)


def test_the_program_names_the_damaged_file_and_exits_with_2(linked, tmp_path):
    replace(linked / FOLDER / "test_batch", b"not CIFAR-10")
    done = train("--dataset", "cifar10", "--data-dir", linked, cwd=tmp_path)
    assert done.returncode == 2
    assert f"{linked / FOLDER / 'test_batch'} is damaged" in done.stderr
    assert "Traceback" not in done.stderr


# Not to be had


def test_three_ways_out(small, server, data_dir, expect):
    """Which sources failed, why, and what to do about it; nothing is left behind."""
    built_in = server.plays("/built-in", says(500))
    mine = server.plays("/mine", says(404))
    expect(small, built_in)
    with pytest.raises(UserError) as caught:
        prepare(data_dir, data_url=mine)
    said = str(caught.value)
    assert f"{mine}: HTTP 404 Not Found; {built_in}: HTTP 500 Internal Server Error" in said
    assert "--data-url URL" in said
    assert f"copy the folder {FOLDER} or the file {ARCHIVE} into {data_dir}" in said
    assert "--dataset synthetic" in said
    assert "\n" not in said
    assert state(data_dir) == {}


def test_not_required_gives_the_reason(small, server, data_dir, expect):
    url = server.plays("/built-in", says(500))
    expect(small, url)
    reason = prepare(data_dir, required=False)
    assert reason is not None
    assert f"{url}: HTTP 500" in reason
    assert str(data_dir) in reason


def test_folder_that_can_not_be_made(small, tmp_path):
    """A data folder that can't be written is a reason like any other, and named."""
    (tmp_path / "file").write_text("in the way")
    data_dir = tmp_path / "file" / "data"
    reason = prepare(data_dir, required=False)
    assert reason is not None
    assert f"not in {data_dir}, and it can't be put there" in reason
    with pytest.raises(UserError, match="Three ways out"):
        prepare(data_dir)


def test_folder_that_can_not_be_written(small, data_dir, monkeypatch):
    """As on a read-only file system, where not even the lock can be made."""

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", str(data_dir / ".cifar-10.lock"))

    monkeypatch.setattr("filelock.FileLock.acquire", read_only)
    reason = prepare(data_dir, required=False)
    assert reason is not None
    assert "can't be put there ([Errno 30] Read-only file system" in reason


# torchvision that doesn't fit torch


def test_torchvision_whose_operators_do_not_load(real_data, tmp_path):
    """Where torchvision's compiled part isn't loaded, `import torchvision` fails, and CIFAR-10 loads all the same."""
    program = textwrap.dedent(f"""
        import gc
        from pathlib import Path
        import torch

        def not_this_one(path):
            raise OSError(f"Could not load this library: {{path}}")

        torch.ops.load_library = not_this_one
        try:
            import torchvision
        except RuntimeError as error:
            print(error)

        from cifar.datasets.cifar10 import load_cifar10

        (images, _), (_, labels) = load_cifar10(Path({str(real_data.resolve())!r}))
        print(tuple(images.shape), len(labels))
        gc.collect()
        print(len(torch._C._jit_get_schemas_for_operator("torchvision::nms")))
    """)
    done = run([sys.executable, "-c", program], cwd=tmp_path)
    assert done.stdout.splitlines() == [
        "operator torchvision::nms does not exist",
        "(50000, 3, 32, 32) 10000",
        "1",  # declared for good: an operator goes when the object that declared it does
    ], done.stderr


def test_other_faults_of_torchvision_are_not_hidden(monkeypatch):
    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "torchvision.datasets":
                raise RuntimeError("something else")

    monkeypatch.delitem(sys.modules, "torchvision.datasets", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(RuntimeError, match="something else"):
        cifar10._torchvision_cifar10()
