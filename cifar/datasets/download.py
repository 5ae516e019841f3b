"""Download an archive from one of several sources, resumable and verified by SHA-256, and unpack it.

torch.hub, torchvision and pooch start over after an interruption; a slow source needs an hour for CIFAR-10.
"""

import base64
import contextlib
import hashlib
import http.client
import os
import shutil
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from cifar.errors import UserError, without_credentials

_CHUNK = 1 << 20  # bytes
_ATTEMPTS = 5  # for each source


@dataclass(frozen=True)
class Archive:
    """The archive of a dataset.

    Attributes:
        title: name of the dataset, for messages.
        name: of the file.
        folder: that it unpacks to.
        size: in bytes.
        sha256: in hexadecimal.
        urls: sources, to be tried in order.
    """

    title: str
    name: str
    folder: str
    size: int
    sha256: str
    urls: tuple[str, ...]


class DownloadError(Exception):
    """The reason why a source failed, or the reasons of all sources."""


class UnavailableError(UserError):
    """A dataset is not on disk and cannot be downloaded.

    Attributes:
        reason: why, to follow the name of the dataset.
    """

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text)
        self.reason = reason


def prepare(archive: Archive, data_dir: Path, data_url: str | None) -> None:
    """Ensure that `data_dir` holds the folder of `archive`: unpacked already, or from an archive there, or downloaded.

    Launches that share a directory take turns. An existing folder is not touched and may be read-only.

    Args:
        data_url: a source to try before the archive's own.

    Raises:
        UnavailableError: no source worked, or `data_dir` cannot be written.
        UserError: an archive in `data_dir` is corrupt.
    """
    folder, file, title = data_dir / archive.folder, data_dir / archive.name, archive.title
    try:
        if folder.exists():
            return
        data_dir.mkdir(parents=True, exist_ok=True)
        with _lock(archive, data_dir):
            if folder.exists():
                return
            if not file.exists():
                urls = ((data_url,) if data_url else ()) + archive.urls
                part = fetch(replace(archive, urls=urls), data_dir)
                _unpack(archive, part, data_dir)
                part.unlink()
            elif sha256(file) == archive.sha256:
                _unpack(archive, file, data_dir)
            else:
                raise UserError(
                    f"{file} is corrupt or incomplete: its SHA-256 is not that of {title}; "
                    f"move it away to download it again"
                )
        return
    except DownloadError as error:
        reason = f"it is not in {data_dir} and no source worked ({error})"
    except OSError as error:
        reason = f"it is not in {data_dir} and cannot be written there ({error})"
    raise UnavailableError(
        f"{title} is not available: {reason}; name a mirror with --data-url URL, copy the directory {archive.folder} "
        f"or the file {archive.name} into {data_dir}, or use the synthetic dataset with --dataset synthetic",
        reason,
    )


def _lock(archive: Archive, data_dir: Path) -> AbstractContextManager[object]:
    """Return a lock that only one process at a time holds; it is released on exit."""
    lock = FileLock(data_dir / f".{archive.title.lower()}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that downloads {archive.title} into {data_dir}", flush=True)
        return lock.acquire()


def _unpack(archive: Archive, file: Path, data_dir: Path) -> None:
    """Unpack a verified archive into its folder in `data_dir`, wholly or not at all. The lock is held."""
    prefix = f".{archive.title.lower()}-"
    for leftover in data_dir.glob(f"{prefix}*/"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir=data_dir) as temporary,
        tarfile.open(file) as tar,
    ):
        tar.extractall(temporary, filter="data")
        os.rename(Path(temporary) / archive.folder, data_dir / archive.folder)


def fetch(archive: Archive, folder: Path, timeout: float = 20.0) -> Path:
    """Download `archive`, or the rest of it, and return the verified file `folder/NAME.part`. The caller deletes it.

    Args:
        timeout: seconds without a byte after which a source has stalled.

    Raises:
        DownloadError: no source worked.
        OSError: the directory cannot be written.
    """
    part = folder / f"{archive.name}.part"
    part.touch()
    failures = []
    for url in archive.urls:
        for _ in range(_ATTEMPTS):
            before = part.stat().st_size
            try:
                _receive(url, archive, part, timeout)
                if sha256(part) == archive.sha256:
                    return part
                part.write_bytes(b"")  # start over: the wrong bytes may come from an earlier source
                reason = "the SHA-256 is not that of the archive"
            except DownloadError as error:
                reason = str(error)
            if part.stat().st_size == before:
                break  # nothing gained
        failures.append(f"{without_credentials(url)}: {reason}")
    if part.stat().st_size == 0:
        part.unlink()
    raise DownloadError("; ".join(failures))


def _receive(url: str, archive: Archive, part: Path, timeout: float) -> None:
    """Append the missing bytes to `part`, or replace its content if the source cannot resume."""
    have, size = part.stat().st_size, archive.size
    if have >= size:
        return
    headers = {"User-Agent": "cifar-ddp"} | ({"Range": f"bytes={have}-"} if have else {})
    with _network_errors(timeout):
        response = urllib.request.urlopen(_request(url, headers), timeout=timeout)
    with response:
        if response.status != 206 or f"bytes {have}-" not in response.headers.get("Content-Range", ""):
            have = 0  # the source sends the whole file
        # Refuse a wrong file before it replaces bytes that the next source could resume.
        if response.headers.get_content_type() == "text/html":
            raise DownloadError("sent a web page")
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and have + int(length) != size:
            raise DownloadError(f"has {have + int(length):,} bytes instead of {size:,}")
        print(f"downloading {without_credentials(url)}" + (f", from byte {have:,} on" if have else ""), flush=True)
        draw = sys.stderr.isatty()
        bar = tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=archive.name, disable=not draw)
        with bar, part.open("ab") as file:
            file.truncate(have)
            while have < size:
                with _network_errors(timeout):
                    chunk = response.read1(min(_CHUNK, size - have))
                if not chunk:
                    raise DownloadError(f"ended after {have:,} of {size:,} bytes")
                file.write(chunk)
                bar.update(len(chunk))
                tenth, have = 10 * have // size, have + len(chunk)
                if not draw and 10 * have // size > tenth:
                    print(f"  {10 * have // size}0 % of {size / 1e6:,.1f} MB", flush=True)


def _request(url: str, headers: dict[str, str]) -> urllib.request.Request:
    """Return the request for `url`. Of user and password in it, urllib takes those of FTP only."""
    parts = urllib.parse.urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    if not user or parts.scheme == "ftp":
        return urllib.request.Request(url, headers=headers)
    request = urllib.request.Request(parts._replace(netloc=host).geturl(), headers=headers)
    token = base64.b64encode(urllib.parse.unquote_to_bytes(user)).decode()
    request.add_unredirected_header("Authorization", f"Basic {token}")  # not for the host of a redirection
    return request


@contextlib.contextmanager
def _network_errors(timeout: float) -> Iterator[None]:
    """Convert network errors to DownloadError. (Not used for the disk: no other source would mend that.)"""
    try:
        yield
    except TimeoutError as error:
        raise DownloadError(f"no data for {timeout:g} s") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        text = " ".join(str(error).split()).strip("<>")  # on one line, and urllib's brackets removed
        raise DownloadError(text or type(error).__name__) from error


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
