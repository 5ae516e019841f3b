"""Downloads from a real HTTP server on 127.0.0.1 that truncates, stalls and lies."""

import base64
import hashlib
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from cifar.datasets.download import Archive, fetch
from tests.helpers.http_server import Exchange, Reply, Server, says, serves, stalls

CONTENT = random.Random(0).randbytes(300_000)
ARCHIVE = Archive("Small", "small.tar.gz", "small", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), ())
LIE = random.Random(1).randbytes(len(CONTENT))


@pytest.fixture
def server():
    with Server() as running:
        yield running


def get(folder: Path, *urls: str, timeout: float = 5.0) -> bytes:
    """Fetch ARCHIVE from `urls`, and return the content of the file."""
    path = fetch(replace(ARCHIVE, urls=urls), folder, timeout)
    assert path == part(folder)
    return path.read_bytes()


def part(folder: Path) -> Path:
    return folder / "small.tar.gz.part"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_credentials_reach_their_host_only(server, tmp_path, capsys):
    """Not the host of a redirection, nor the screen."""
    sent = []

    def redirects(reply: Reply) -> None:
        sent.append(reply.headers["Authorization"])
        reply.head(302, 0, Location=server.plays("/there", arrives))

    def arrives(reply: Reply) -> None:
        sent.append(reply.headers["Authorization"])
        serves(CONTENT)(reply)

    signed = "?signature=secret"
    address = [server.plays(f"{path}{signed}", redirects).replace("//", "//me:secret%40@") for path in ("/a", "/b")]
    assert get(tmp_path, address[0]) == CONTENT
    assert sent == ["Basic " + base64.b64encode(b"me:secret@").decode(), None]
    part(tmp_path).unlink()
    server.plays(f"/b{signed}", says(403))
    with pytest.raises(OSError, match="403") as caught:
        get(tmp_path, address[1])
    assert "secret" not in str(caught.value) + str(capsys.readouterr())


def test_truncated_download_is_resumed(server, tmp_path):
    """The same source is asked for the rest, and only the rest is transferred."""
    assert get(tmp_path, server.plays("/a", serves(CONTENT, upto=100_000), serves(CONTENT))) == CONTENT
    assert server.exchanges == [Exchange("/a", None, 100_000), Exchange("/a", "bytes=100000-", 200_000)]


def test_next_source_resumes(server, tmp_path):
    dies = server.plays("/dies", serves(CONTENT, upto=100_000), says(503))
    assert get(tmp_path, dies, server.plays("/good", serves(CONTENT))) == CONTENT
    assert server.exchanges[-1] == Exchange("/good", "bytes=100000-", 200_000)


@pytest.mark.parametrize(
    ("have", "behaviour", "exchanges"),
    [
        (250_000, serves(CONTENT), [Exchange("/a", "bytes=250000-", 50_000)]),
        (300_000, says(500), []),
        (1_000, says(200, CONTENT), [Exchange("/a", "bytes=1000-", 300_000)]),
        (0, says(200, CONTENT, length=False), [Exchange("/a", None, 300_000)]),
    ],
    ids=["rest", "nothing", "no range", "no length"],
)
def test_partial_file_of_another_launch_is_resumed(server, tmp_path, have, behaviour, exchanges):
    """A server that ignores Range sends the whole file."""
    part(tmp_path).write_bytes(CONTENT[:have])
    assert get(tmp_path, server.plays("/a", behaviour)) == CONTENT
    assert server.exchanges == exchanges


def test_repeated_truncation_is_given_up(server, tmp_path):
    """After five attempts, and what they brought is kept."""
    with pytest.raises(OSError, match=r"/a: ended after 50,000 of 300,000 bytes"):
        get(tmp_path, server.plays("/a", serves(CONTENT, upto=10_000)))
    assert len(server.exchanges) == 5
    assert part(tmp_path).read_bytes() == CONTENT[:50_000]


def test_stalled_source_is_given_up(server, tmp_path):
    """Before the headers, before the first byte, and half way, where it is resumed."""
    urls = [server.plays("/a", stalls), server.plays("/b", serves(CONTENT, upto=0, then=stalls))]
    with pytest.raises(OSError, match=r"/a: timed out; .*/b: timed out"):
        get(tmp_path, *urls, timeout=0.2)
    assert server.paths == ["/a", "/b"]
    assert names(tmp_path) == []

    half_way = server.plays("/c", serves(CONTENT, upto=120_000, then=stalls), serves(CONTENT))
    assert get(tmp_path, half_way, timeout=0.2) == CONTENT
    assert server.exchanges[-1] == Exchange("/c", "bytes=120000-", 180_000)


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (says(404), "HTTP Error 404: Not Found"),
        (says(200, b"<html>Please log in</html>", "text/html; charset=utf-8"), "sent a web page"),
        (says(200, LIE), "the SHA-256 is not that of the archive"),
        (says(200, LIE + b"!", length=False), "the SHA-256 is not that of the archive"),
        (lambda reply: reply.wfile.write(b"not HTTP\r\n"), "not HTTP"),
    ],
    ids=["404", "page", "wrong bytes", "too long", "not HTTP"],
)
def test_wrong_content_is_refused(server, tmp_path, behaviour, reason):
    """The source is asked once and named with its reason, and the next one is asked for the whole file."""
    liar = server.plays("/liar", behaviour)
    with pytest.raises(OSError, match=f"^{liar}: {reason}$"):
        get(tmp_path, liar)
    assert server.paths == ["/liar"]
    assert names(tmp_path) == []

    assert get(tmp_path, liar, server.plays("/good", serves(CONTENT))) == CONTENT
    assert server.exchanges[2:] == [Exchange("/good", None, len(CONTENT))]


def test_wrong_content_does_not_replace_a_partial_file(server, tmp_path):
    part(tmp_path).write_bytes(CONTENT[:1000])
    page = server.plays("/page", says(200, b"<html>Please log in</html>", "text/html", length=False))
    short = server.plays("/short", serves(CONTENT[:1000]))  # answers 416
    with pytest.raises(OSError, match=r"sent a web page; .*HTTP Error 416"):
        get(tmp_path, page, short)
    assert part(tmp_path).read_bytes() == CONTENT[:1000]


@pytest.mark.parametrize("size", [1000, len(CONTENT), len(CONTENT) + 1000], ids=["shorter", "as long", "longer"])
def test_wrong_partial_file_is_replaced(server, tmp_path, size):
    part(tmp_path).write_bytes((LIE * 2)[:size])
    assert get(tmp_path, server.plays("/a", serves(CONTENT))) == CONTENT
    assert server.exchanges[-1] == Exchange("/a", None, len(CONTENT))


def test_urls_that_are_not_http(tmp_path):
    """A mirror may be a local file."""
    mirror = tmp_path / "mirror.tar.gz"
    mirror.write_bytes(CONTENT)
    with pytest.raises(OSError, match=r"^mirror.example/a: unknown url type: .*; http://127.0.0.1:1/a: .*refused"):
        get(tmp_path, "mirror.example/a", "http://127.0.0.1:1/a")
    assert get(tmp_path, mirror.as_uri()) == CONTENT
    assert mirror.read_bytes() == CONTENT


def test_progress_begins_where_the_partial_file_ends(server, tmp_path, capsys):
    part(tmp_path).write_bytes(CONTENT[:150_000])
    url = server.plays("/a", serves(CONTENT))
    get(tmp_path, url)
    shown = capsys.readouterr()
    assert shown.out == f"downloading {url}\n"
    assert re.search(r"small.tar.gz: +50%.*small.tar.gz: +100%", shown.err, re.DOTALL)
