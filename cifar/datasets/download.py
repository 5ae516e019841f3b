"""Fetching one archive from the first of several sources that serves it whole: resumable, verified, never trusted."""

import contextlib
import hashlib
import http.client
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

_CHUNK = 1 << 20
_ATTEMPTS = 5


@dataclass(frozen=True)
class Archive:
    """A file to be had from several places: `size` in bytes, `sha256` in hexadecimal, `urls` in order of preference."""

    name: str
    size: int
    sha256: str
    urls: tuple[str, ...]


class DownloadError(Exception):
    """No source served the archive; the text says which failed and why."""


def fetch(archive: Archive, urls: Sequence[str], folder: Path, show: bool = True, timeout: float = 20.0) -> Path:
    """Download `archive` into `folder`, going on from a partial file, and check its SHA-256.

    Args:
        urls: sources to try in order.
        show: print progress.
        timeout: seconds without a byte after which a source has stalled.

    Returns:
        The path of the verified file, `folder/NAME.part`, which is the caller's to delete.

    Raises:
        DownloadError: no source worked.
        OSError: the folder can't be written.
    """
    part = folder / (archive.name + ".part")
    part.touch()
    failures = []
    for url in urls:
        reason = _fetch_from(url, archive, part, show, timeout)
        if reason is None:
            return part
        failures.append(f"{url}: {reason}")
    if part.stat().st_size == 0:
        part.unlink()
    raise DownloadError("; ".join(failures))


def _fetch_from(url: str, archive: Archive, part: Path, show: bool, timeout: float) -> str | None:
    """Try one source; the reason for which it failed, or None."""
    reason = ""
    for _ in range(_ATTEMPTS):
        start = part.stat().st_size
        try:
            _receive(url, archive, part, show, timeout)
        except _SourceError as error:
            reason = str(error)
        else:
            digest = sha256(part)
            if digest == archive.sha256:
                return None
            reason = f"SHA-256 is {digest[:12]}..., not {archive.sha256[:12]}...: not the archive it should be"
            part.write_bytes(b"")  # only ever bytes that this program wrote
            if start > 0:
                continue  # the fault may lie in what an earlier source left: once more, from the beginning
        if part.stat().st_size <= start:
            break  # nothing gained: another try would go the same way
    return reason


def _receive(url: str, archive: Archive, part: Path, show: bool, timeout: float) -> None:
    """Append to `part` what is missing of it. Returns when the file has its full size.

    Raises:
        _SourceError: the source has something else, or stopped before the end.
    """
    have = part.stat().st_size
    if have >= archive.size:
        return
    with contextlib.ExitStack() as stack:
        with _blaming_source(timeout):
            request = urllib.request.Request(url, headers={"User-Agent": "cifar-ddp"})
            if have:
                request.add_header("Range", f"bytes={have}-")
            response = stack.enter_context(urllib.request.urlopen(request, timeout=timeout))
        resumes = response.status == 206 and f"bytes {have}-" in response.headers.get("Content-Range", "")
        if not resumes:
            have = 0  # the server sends the whole file
        _check_offer(response.headers, archive, have)
        if show:
            print(f"downloading {url}" + (f", from byte {have:,} on" if have else ""), flush=True)
        file = stack.enter_context(part.open("r+b"))
        advance = stack.enter_context(_progress(archive, have, show))
        file.truncate(have)
        file.seek(have)
        while True:
            with _blaming_source(timeout):
                chunk = response.read1(_CHUNK)
            if not chunk:
                break
            have += len(chunk)
            if have > archive.size:
                file.truncate(0)  # none of it can be trusted
                raise _SourceError(f"sends more than the {archive.size:,} bytes of the archive")
            file.write(chunk)
            advance(len(chunk))
    if have < archive.size:
        raise _SourceError(f"ended after {have:,} of {archive.size:,} bytes")


def _check_offer(headers: Message, archive: Archive, have: int) -> None:
    """Refuse what can't be the archive before a byte of it is kept, so that the next source needn't repair it."""
    if headers.get_content_type() == "text/html":
        raise _SourceError("sends a web page, not the archive")
    length = headers.get("Content-Length", "")
    if length.isdecimal() and have + int(length) != archive.size:
        raise _SourceError(f"has {have + int(length):,} bytes, not the {archive.size:,} of the archive")


class _SourceError(Exception):
    """Why a source failed."""


@contextlib.contextmanager
def _blaming_source(timeout: float) -> Iterator[None]:
    """Tell the network's failures, which are the source's, from the disk's, which no other source would mend."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        raise _SourceError(f"HTTP {error.code} {error.reason}") from error
    except TimeoutError as error:
        raise _SourceError(f"no data for {timeout:g} s") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _SourceError(str(getattr(error, "reason", "") or error) or type(error).__name__) from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _progress(archive: Archive, have: int, show: bool) -> Iterator[Any]:
    """A bar on a terminal, a line for every tenth otherwise."""
    if show and sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=archive.size, initial=have, unit="B", unit_scale=True, desc=archive.name) as bar:
            yield bar.update
        return

    done = have

    def advance(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        tenth = 10 * done // archive.size
        if show and tenth > 10 * before // archive.size:
            print(f"  {10 * tenth} % of {archive.size / 1e6:,.1f} MB", flush=True)

    yield advance
