"""Downloads from a real HTTP server on 127.0.0.1 that truncates, stalls and lies."""

import base64
import hashlib
import random
from dataclasses import replace

import pytest

from cifar.datasets.download import Archive, fetch
from tests.helpers.http_server import Reply, says, serves, stalls

CONTENT = random.Random(0).randbytes(300_000)
ARCHIVE = Archive("Small", "small.tar.gz", "small", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), ())
LIE = random.Random(1).randbytes(len(CONTENT))


@pytest.fixture
def part(tmp_path):
    return tmp_path / "small.tar.gz.part"


def get(part, *urls: str, timeout: float = 5.0) -> bytes:
    """Fetch ARCHIVE from `urls`, and return the content of the file."""
    assert fetch(replace(ARCHIVE, urls=urls), part.parent, timeout) == part
    return part.read_bytes()


def test_credentials_reach_their_host_only(server, part, capsys):
    """Not the host of a redirection, nor the screen."""
    sent = []

    def redirects(reply: Reply) -> None:
        sent.append(reply.headers["Authorization"])
        reply.send(302, b"", Content_Length=0, Location=server.plays("/there", arrives))

    def arrives(reply: Reply) -> None:
        sent.append(reply.headers["Authorization"])
        serves(CONTENT)(reply)

    signed = "?signature=secret"
    address = [server.plays(f"{path}{signed}", redirects).replace("//", "//me:secret%40@") for path in ("/a", "/b")]
    assert get(part, address[0]) == CONTENT
    assert sent == ["Basic " + base64.b64encode(b"me:secret@").decode(), None]
    part.unlink()
    server.plays(f"/b{signed}", says(403))
    with pytest.raises(OSError, match="403") as caught:
        get(part, address[1])
    assert "secret" not in str(caught.value) + str(capsys.readouterr())


@pytest.mark.parametrize(
    ("have", "scripts", "requests"),
    [
        (b"", [[serves(CONTENT, upto=100_000), serves(CONTENT)]], [("/0", 0), ("/0", 100_000)]),
        (b"", [[serves(CONTENT, upto=100_000), says(503)], [serves(CONTENT)]],
         [("/0", 0), ("/0", 100_000), ("/1", 100_000)]),
        (b"", [[serves(CONTENT, upto=120_000, then=stalls), serves(CONTENT)]], [("/0", 0), ("/0", 120_000)]),
        (CONTENT[:250_000], [[serves(CONTENT)]], [("/0", 250_000)]),
        (CONTENT[:1000], [[says(200, CONTENT)]], [("/0", 1000)]),
        (CONTENT, [[says(500)]], []),
        (LIE[:1000], [[serves(CONTENT)]], [("/0", 1000), ("/0", 0)]),
        (LIE, [[serves(CONTENT)]], [("/0", 0)]),
        (LIE + LIE[:1000], [[serves(CONTENT)]], [("/0", 0)]),
    ],
    ids=["truncated", "next source", "stalled", "other launch", "no range", "complete", "wrong", "wrong whole", "long"],
)  # fmt: skip
def test_interrupted_download_is_resumed(server, part, have, scripts, requests):
    """Only the rest is transferred, unless the source ignores the range or what was there is wrong."""
    part.write_bytes(have)
    urls = [server.plays(f"/{number}", *script) for number, script in enumerate(scripts)]
    assert get(part, *urls, timeout=0.4) == CONTENT
    assert server.requests == requests


def test_repeated_truncation_is_given_up(server, part):
    """After five attempts, and what they brought is kept."""
    with pytest.raises(OSError, match=r"/a: incomplete"):
        get(part, server.plays("/a", serves(CONTENT, upto=10_000)))
    assert len(server.requests) == 5
    assert part.read_bytes() == CONTENT[:50_000]


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (says(404), "HTTP Error 404: Not Found"),
        (says(200, b"<html>Please log in</html>", "text/html; charset=utf-8"), "sent a web page"),
        (says(200, LIE), "incomplete, or another file"),
        (lambda reply: reply.wfile.write(b"not HTTP\r\n"), "not HTTP"),
        (stalls, "timed out"),
    ],
    ids=["404", "page", "wrong bytes", "not HTTP", "stalls"],
)
def test_bad_source_is_left(server, part, behaviour, reason):
    """It is asked once and named with its reason, and the next one is asked for the whole file."""
    bad = server.plays("/bad", behaviour)
    with pytest.raises(OSError, match=f"^{bad}: {reason}$"):
        get(part, bad, timeout=0.4)
    assert server.requests == [("/bad", 0)]
    assert list(part.parent.iterdir()) == []
    assert get(part, bad, server.plays("/good", serves(CONTENT)), timeout=0.4) == CONTENT
    assert server.requests[2:] == [("/good", 0)]


def test_wrong_content_does_not_replace_a_partial_file(server, part):
    part.write_bytes(CONTENT[:1000])
    page = server.plays("/page", says(200, b"<html>Please log in</html>", "text/html"))
    short = server.plays("/short", serves(CONTENT[:1000]))  # answers 416
    with pytest.raises(OSError, match=r"sent a web page; .*HTTP Error 416"):
        get(part, page, short)
    assert part.read_bytes() == CONTENT[:1000]


def test_urls_that_are_not_http(tmp_path, part):
    """A mirror may be a local file."""
    mirror = tmp_path / "mirror.tar.gz"
    mirror.write_bytes(CONTENT)
    with pytest.raises(OSError, match=r"^mirror.example/a: unknown url type: .*; http://127.0.0.1:1/a: .*refused"):
        get(part, "mirror.example/a", "http://127.0.0.1:1/a")
    assert get(part, mirror.as_uri()) == mirror.read_bytes() == CONTENT
