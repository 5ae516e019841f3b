"""Download an archive from one of several sources: resumable, and verified by SHA-256.

torch.hub, torchvision and pooch start over after an interruption; a slow source needs an hour for CIFAR-10.
"""

import contextlib
import hashlib
import http.client
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

_CHUNK = 1 << 20  # bytes
_ATTEMPTS = 5  # for each source


@dataclass(frozen=True)
class Archive:
    """A file: `size` in bytes, `sha256` in hexadecimal, `urls` of sources to try in order."""

    name: str
    size: int
    sha256: str
    urls: tuple[str, ...]


class DownloadError(Exception):
    """The reason why a source failed, or the reasons of all sources."""


def fetch(archive: Archive, folder: Path, show: bool = True, timeout: float = 20.0) -> Path:
    """Download `archive`, or the rest of it, and return the verified file `folder/NAME.part`. The caller deletes it.

    Args:
        show: print progress.
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
                _receive(url, archive, part, show, timeout)
                if sha256(part) == archive.sha256:
                    return part
                part.write_bytes(b"")  # start over: the wrong bytes may come from an earlier source
                reason = "the SHA-256 is not that of the archive"
            except DownloadError as error:
                reason = str(error)
            if part.stat().st_size == before:
                break  # nothing gained
        failures.append(f"{url}: {reason}")
    if part.stat().st_size == 0:
        part.unlink()
    raise DownloadError("; ".join(failures))


def _receive(url: str, archive: Archive, part: Path, show: bool, timeout: float) -> None:
    """Append the missing bytes to `part`, or replace its content if the source cannot resume."""
    have, size = part.stat().st_size, archive.size
    if have >= size:
        return
    headers = {"User-Agent": "cifar-ddp"} | ({"Range": f"bytes={have}-"} if have else {})
    with _network_errors(timeout):
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    with response:
        if response.status != 206 or f"bytes {have}-" not in response.headers.get("Content-Range", ""):
            have = 0  # the source sends the whole file
        # Refuse a wrong file before it replaces bytes that the next source could resume.
        if response.headers.get_content_type() == "text/html":
            raise DownloadError("sent a web page")
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and have + int(length) != size:
            raise DownloadError(f"has {have + int(length):,} bytes instead of {size:,}")
        if show:
            print(f"downloading {url}" + (f", from byte {have:,} on" if have else ""), flush=True)
        draw = show and sys.stderr.isatty()
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
                if show and not draw and 10 * have // size > tenth:
                    print(f"  {10 * have // size}0 % of {size / 1e6:,.1f} MB", flush=True)


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
