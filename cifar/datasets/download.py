"""Download an archive from one of several sources, resumable and verified by SHA-256, and unpack it.

torch.hub, torchvision and pooch start over after an interruption; a slow source needs an hour for CIFAR-10.
"""

import base64
import hashlib
import http.client
import os
import shutil
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from cifar.errors import UserError, first_line, without_credentials
from cifar.files import lock

_CHUNK = 1 << 20  # bytes
_ATTEMPTS = 5  # for each source


@dataclass(frozen=True)
class Archive:
    """The archive of a dataset."""

    title: str  # name of the dataset, for messages
    name: str  # of the file
    folder: str  # that it unpacks to
    size: int  # in bytes
    sha256: str  # in hexadecimal
    urls: tuple[str, ...]  # sources, to be tried in order


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
        with lock(data_dir / f".{title.lower()}.lock", f"downloads {title} into {data_dir}"):
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
    except OSError as error:
        reason = f"it is not in {data_dir} and cannot be put there ({error})"
        raise UnavailableError(
            f"{title} is not available: {reason}; name a mirror with --data-url URL, copy the directory "
            f"{archive.folder} or the file {archive.name} into {data_dir}, or use the synthetic dataset with "
            f"--dataset synthetic",
            reason,
        ) from error


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

    A source is asked again, five times in all, while it brings bytes.

    Args:
        timeout: seconds without a byte after which a source has stalled.

    Raises:
        OSError: no source worked, and why, or the directory cannot be written.
    """
    part = folder / f"{archive.name}.part"
    part.touch()
    failures = []
    for url in archive.urls:
        for _ in range(_ATTEMPTS):
            before = part.stat().st_size
            try:
                _receive(url, archive, part, timeout)
                reason = f"ended after {part.stat().st_size:,} of {archive.size:,} bytes"
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = first_line(error)
            if part.stat().st_size >= archive.size:
                if sha256(part) == archive.sha256:
                    return part
                part.write_bytes(b"")  # start over: the wrong bytes may come from an earlier source
                reason = "the SHA-256 is not that of the archive"
            if part.stat().st_size == before:
                break
        failures.append(f"{without_credentials(url)}: {reason}")
    if part.stat().st_size == 0:
        part.unlink()
    raise OSError("; ".join(failures))


def _receive(url: str, archive: Archive, part: Path, timeout: float) -> None:
    """Append the missing bytes to `part`, or replace its content if the source cannot resume."""
    have = part.stat().st_size
    if have >= archive.size:
        return
    headers = {"User-Agent": "cifar-ddp"} | ({"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(_request(url, headers), timeout=timeout) as response, part.open("ab") as file:
        if response.headers.get_content_type() == "text/html":  # a login page must not replace what is there
            raise ValueError("sent a web page")
        if response.status != 206:  # the source sends the whole file
            have = file.truncate(0)
        print(f"downloading {without_credentials(url)}", flush=True)
        seconds = 0.1 if sys.stderr.isatty() else 10.0  # between updates, which remain in a log
        unit = {"unit": "B", "unit_scale": True}
        with tqdm(desc=archive.name, total=archive.size, initial=have, mininterval=seconds, **unit) as bar:
            while bar.n < archive.size and (chunk := response.read1(_CHUNK)):
                file.write(chunk)
                bar.update(len(chunk))


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


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
