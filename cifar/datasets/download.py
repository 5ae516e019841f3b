"""Download an archive from one of several sources, resumable and verified by SHA-256, and unpack it.

torch.hub, torchvision and pooch start over after an interruption; a slow source needs an hour for CIFAR-10.
"""

import base64
import hashlib
import http.client
import shutil
import sys
import urllib.parse
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from cifar.errors import UserError, first_line, without_credentials
from cifar.files import lock


@dataclass(frozen=True)
class Archive:
    """The archive of a dataset."""

    title: str  # name of the dataset, for messages
    name: str  # of the file
    folder: str  # that it unpacks to
    size: int  # in bytes
    sha256: str  # in hexadecimal
    urls: tuple[str, ...]  # sources, to be tried in order

    def parent(self, data_dir: Path) -> Path:
        """Return the directory that holds the folder: `data_dir`, or the one above it if `data_dir` is the folder."""
        return data_dir.parent if data_dir.name == self.folder else data_dir


class UnavailableError(UserError):
    """A dataset is not on disk and cannot be downloaded."""


def prepare(archive: Archive, data_dir: Path, data_url: str | None) -> None:
    """Ensure that `data_dir` holds the folder of `archive`: unpacked already, or from an archive there, or downloaded.

    Launches that share a directory take turns. An existing folder is not touched and may be read-only. `data_url` is a
    source to try before the archive's own. A UserError names a corrupt archive; an UnavailableError says why no source
    worked or nothing can be written.
    """
    data_dir = archive.parent(data_dir)
    folder, title = data_dir / archive.folder, archive.title
    try:
        if folder.exists():
            return
        data_dir.mkdir(parents=True, exist_ok=True)
        with lock(data_dir / f".{title.lower()}.lock", f"downloads {title} into {data_dir}"):
            if folder.exists():
                return
            file = data_dir / archive.name
            if not file.exists():
                urls = ((data_url,) if data_url else ()) + archive.urls
                part = fetch(replace(archive, urls=urls), data_dir)
                _unpack(archive, part, data_dir)
                part.unlink()
            elif _sha256(file) == archive.sha256:
                _unpack(archive, file, data_dir)
            else:
                raise UserError(f"{file} is corrupt or incomplete: move it away to download it again")
    except OSError as error:
        raise UnavailableError(
            f"{title} is not in {data_dir} and cannot be put there ({error}): name a mirror with --data-url URL, copy "
            f"the directory {archive.folder} or the file {archive.name} there, or use --dataset synthetic"
        ) from error


def _unpack(archive: Archive, file: Path, data_dir: Path) -> None:
    """Unpack a verified archive into its folder in `data_dir`, wholly or not at all. The lock is held."""
    temporary = data_dir / f".{archive.title.lower()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        shutil.unpack_archive(file, temporary, "gztar", filter="data")
        (temporary / archive.folder).rename(data_dir / archive.folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fetch(archive: Archive, folder: Path, timeout: float = 20.0) -> Path:
    """Download `archive`, or the rest of it, and return the verified file `folder/NAME.part`. The caller deletes it.

    A source is asked again, five times in all, while it brings bytes; it has stalled after `timeout` seconds without
    any. An OSError says why no source worked, or that the directory cannot be written.
    """
    part = folder / f"{archive.name}.part"
    part.touch()
    failures = []
    for url in archive.urls:
        for _ in range(5):
            before = part.stat().st_size
            reason = "incomplete, or another file"
            try:
                if before < archive.size:
                    _receive(url, archive, part, timeout)
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = first_line(error)
            if part.stat().st_size >= archive.size:
                if _sha256(part) == archive.sha256:
                    return part
                part.write_bytes(b"")  # start over: the wrong bytes may come from an earlier source
            if part.stat().st_size == before:
                break
        failures.append(f"{without_credentials(url)}: {reason}")
    if part.stat().st_size == 0:
        part.unlink()
    raise OSError("; ".join(failures))


def _receive(url: str, archive: Archive, part: Path, timeout: float) -> None:
    """Append the missing bytes to `part`, or replace its content if the source cannot resume."""
    size = part.stat().st_size
    with urllib.request.urlopen(_request(url, size), timeout=timeout) as response, part.open("ab") as file:
        if response.headers.get_content_type() == "text/html":  # a login page must not replace what is there
            raise ValueError("sent a web page")
        if response.status != 206:  # the source sends the whole file
            size = file.truncate(0)
        print(f"downloading {without_credentials(url)}", flush=True)
        interval = 0.1 if sys.stderr.isatty() else 10.0  # seconds between updates, which remain in a log
        with tqdm(total=archive.size, initial=size, unit="B", unit_scale=True, mininterval=interval) as bar:
            while bar.n < archive.size and (chunk := response.read1(1 << 20)):
                file.write(chunk)
                bar.update(len(chunk))


def _request(url: str, start: int) -> urllib.request.Request:
    """Return the request for the bytes from `start`, with user and password of the URL, which urllib ignores."""
    parts = urllib.parse.urlsplit(url)
    credentials, _, host = parts.netloc.rpartition("@")
    headers = {"User-Agent": "cifar-ddp", "Range": f"bytes={start}-"}
    request = urllib.request.Request(parts._replace(netloc=host).geturl(), headers=headers)
    if credentials:
        token = base64.b64encode(urllib.parse.unquote_to_bytes(credentials)).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")  # not for the host of a redirection
    return request


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
