"""Fetching from a real HTTP server on 127.0.0.1 that serves, truncates, stalls and lies."""

import hashlib
import random
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cifar.datasets.download import Archive, DownloadError, fetch, sha256

CONTENT = random.Random(0).randbytes(300_000)
ARCHIVE = Archive("small.tar.gz", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), ())
LIE = random.Random(1).randbytes(len(CONTENT))


@dataclass
class Exchange:
    """One request that the server saw: its path, its Range header, and the bytes of body that went out."""

    path: str
    range: str | None
    sent: int = 0


class Reply(BaseHTTPRequestHandler):
    """One answer; the behaviours below drive it."""

    server: "Server"
    exchange: Exchange

    def do_GET(self) -> None:
        self.exchange = Exchange(self.path, self.headers.get("Range"))
        with self.server.lock:
            self.server.exchanges.append(self.exchange)
            script = self.server.scripts[self.path]
            behaviour = script.pop(0) if len(script) > 1 else script[0]
        behaviour(self)

    def head(self, status: int, length: int | None, **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def body(self, content: bytes) -> None:
        self.exchange.sent += len(content)  # before the client can have it and a test can look
        self.wfile.write(content)
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        pass


Behaviour = Callable[[Reply], None]


class Server(ThreadingHTTPServer):
    """A server whose every path plays a script of behaviours, one a request, the last one for ever."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Reply)
        self.lock, self.over = threading.Lock(), threading.Event()
        self.exchanges: list[Exchange] = []
        self.scripts: dict[str, list[Behaviour]] = {}
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> "Server":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """A client that hangs up on a stalled reply is what some tests are about."""

    def plays(self, path: str, *script: Behaviour) -> str:
        """The URL of `path`, which plays `script` from now on."""
        self.scripts[path] = list(script)
        return f"http://127.0.0.1:{self.server_port}{path}"

    @property
    def paths(self) -> list[str]:
        return [exchange.path for exchange in self.exchanges]


def serves(content: bytes = CONTENT, upto: int | None = None, then: Behaviour | None = None) -> Behaviour:
    """Serve `content` and honour Range; with `upto`, send that many bytes, then do `then`, then close."""

    def behaviour(reply: Reply) -> None:
        wanted = reply.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        rest = content[start:]
        if wanted and not rest:
            reply.head(416, 0, Content_Range=f"bytes */{len(content)}")
        elif wanted:
            reply.head(206, len(rest), Content_Range=f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            reply.head(200, len(rest))
        reply.body(rest[:upto])
        if then is not None:
            then(reply)

    return behaviour


def ignores_range(content: bytes = CONTENT, upto: int | None = None) -> Behaviour:
    """Serve all of `content`, whatever was asked for; with `upto`, close after that many bytes."""

    def behaviour(reply: Reply) -> None:
        reply.head(200, len(content))
        reply.body(content[:upto])

    return behaviour


def stalls(reply: Reply) -> None:
    """Send nothing more, and keep the connection."""
    reply.server.over.wait(20)


def says(status: int, content: bytes = b"sorry", kind: str = "text/plain") -> Behaviour:
    def behaviour(reply: Reply) -> None:
        reply.head(status, len(content), Content_Type=kind)
        reply.body(content)

    return behaviour


def without_length(content: bytes) -> Behaviour:
    """Serve `content` up to the end of the connection, and don't say how much it is."""

    def behaviour(reply: Reply) -> None:
        reply.head(200, None)
        reply.body(content)

    return behaviour


@pytest.fixture
def server():
    with Server() as running:
        yield running


def get(urls: list[str] | str, folder: Path, timeout: float = 5.0) -> Path:
    return fetch(ARCHIVE, [urls] if isinstance(urls, str) else urls, folder, show=False, timeout=timeout)


def part(folder: Path) -> Path:
    return folder / "small.tar.gz.part"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_whole(server, tmp_path):
    """A source that serves the archive is asked once, for all of it; the .part file is all that there is."""
    path = get(server.plays("/a", serves()), tmp_path)
    assert path == part(tmp_path)
    assert path.read_bytes() == CONTENT
    assert server.exchanges == [Exchange("/a", None, len(CONTENT))]
    assert names(tmp_path) == ["small.tar.gz.part"]


def test_sources_in_order_until_one_works(server, tmp_path):
    urls = [
        server.plays("/gone", says(404)),
        server.plays("/broken", says(500)),
        server.plays("/good", serves()),
        server.plays("/never", serves()),
    ]
    assert get(urls, tmp_path).read_bytes() == CONTENT
    assert server.paths == ["/gone", "/broken", "/good"]


def test_truncated_then_resumed(server, tmp_path):
    """Cut off, the same source is asked for the rest, and only the rest goes over the wire."""
    path = get(server.plays("/a", serves(upto=100_000), serves()), tmp_path)
    assert path.read_bytes() == CONTENT
    assert server.exchanges == [Exchange("/a", None, 100_000), Exchange("/a", "bytes=100000-", 200_000)]


def test_resumes_what_another_launch_left(server, tmp_path):
    part(tmp_path).write_bytes(CONTENT[:250_000])
    assert get(server.plays("/a", serves()), tmp_path).read_bytes() == CONTENT
    assert server.exchanges == [Exchange("/a", "bytes=250000-", 50_000)]


def test_next_source_goes_on_where_the_last_one_stopped(server, tmp_path):
    dies = server.plays("/dies", serves(upto=100_000), says(503))
    assert get([dies, server.plays("/good", serves())], tmp_path).read_bytes() == CONTENT
    assert server.exchanges[-1] == Exchange("/good", "bytes=100000-", 200_000)


def test_complete_part_needs_no_source(server, tmp_path):
    """A launch stopped between the last byte and the unpacking downloads nothing anew."""
    part(tmp_path).write_bytes(CONTENT)
    assert get(server.plays("/a", says(500)), tmp_path).read_bytes() == CONTENT
    assert server.exchanges == []


def test_server_without_range_sends_all_again(server, tmp_path):
    path = get(server.plays("/a", ignores_range(upto=100_000), ignores_range()), tmp_path)
    assert path.read_bytes() == CONTENT
    assert [exchange.range for exchange in server.exchanges] == [None, "bytes=100000-"]


def test_a_206_for_other_bytes_is_not_appended(server, tmp_path):
    """A server that answers with another range than the one asked for doesn't get to shift the file."""

    def from_the_start(reply: Reply) -> None:
        reply.head(206, len(CONTENT), Content_Range=f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}")
        reply.body(CONTENT)

    part(tmp_path).write_bytes(CONTENT[:1000])
    assert get(server.plays("/a", from_the_start), tmp_path).read_bytes() == CONTENT
    assert len(server.exchanges) == 1


def test_without_a_length(server, tmp_path):
    assert get(server.plays("/a", without_length(CONTENT)), tmp_path).read_bytes() == CONTENT


def test_gives_up_a_source_that_always_truncates(server, tmp_path):
    """A source that brings a little each time is given up after a few tries; what it brought is kept."""
    with pytest.raises(DownloadError, match=r"/a: ended after 50,000 of 300,000 bytes"):
        get(server.plays("/a", serves(upto=10_000)), tmp_path)
    assert len(server.exchanges) == 5
    assert part(tmp_path).read_bytes() == CONTENT[:50_000]


def test_stalls_at_once(server, tmp_path):
    urls = [server.plays("/a", stalls), server.plays("/b", serves(upto=0, then=stalls))]
    with pytest.raises(DownloadError) as caught:
        get(urls, tmp_path, timeout=0.3)
    assert str(caught.value) == f"{urls[0]}: no data for 0.3 s; {urls[1]}: no data for 0.3 s"
    assert server.paths == ["/a", "/b"]
    assert names(tmp_path) == []


def test_stalls_half_way_then_resumed(server, tmp_path):
    url = server.plays("/a", serves(upto=120_000, then=stalls), serves())
    assert get(url, tmp_path, timeout=0.3).read_bytes() == CONTENT
    assert server.exchanges[1] == Exchange("/a", "bytes=120000-", 180_000)


def test_refused_port(server, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, so that nobody else gets it, and not listening
        refused = f"http://127.0.0.1:{unused.getsockname()[1]}/a"
        with pytest.raises(DownloadError, match=r"127\.0\.0\.1:\d+/a: .*Connection refused"):
            get(refused, tmp_path)
        assert get([refused, server.plays("/b", serves())], tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (says(404), "HTTP 404 Not Found"),
        (says(500), "HTTP 500 Internal Server Error"),
        (says(200, b"<html>Please log in</html>", "text/html; charset=utf-8"), "sends a web page"),
        (ignores_range(LIE), "SHA-256 is .*not the archive"),
        (ignores_range(CONTENT + b"!"), "has 300,001 bytes, not the 300,000"),
        (ignores_range(CONTENT[:-1]), "has 299,999 bytes, not the 300,000"),
        (without_length(CONTENT + b"!"), "sends more than the 300,000 bytes"),
    ],
    ids=["404", "500", "web page", "wrong bytes", "too long", "too short", "unending"],
)
def test_liar(server, tmp_path, behaviour, reason):
    """A source that has something else is asked once, named with its reason, and nothing of it is kept.

    The next source is then not asked for the rest of a lie, but for the whole archive, once.
    """
    liar = server.plays("/liar", behaviour)
    with pytest.raises(DownloadError, match=f"{liar}: {reason}"):
        get(liar, tmp_path)
    assert server.paths == ["/liar"]
    assert names(tmp_path) == []

    assert get([liar, server.plays("/good", serves())], tmp_path).read_bytes() == CONTENT
    assert server.exchanges[2:] == [Exchange("/good", None, len(CONTENT))]


def test_a_refusal_of_the_rest_is_not_the_end(server, tmp_path):
    """416, from a source whose file is shorter: the next one resumes."""
    part(tmp_path).write_bytes(CONTENT[:1000])
    short = server.plays("/short", serves(CONTENT[:1000]))
    with pytest.raises(DownloadError, match="HTTP 416"):
        get(short, tmp_path)
    assert part(tmp_path).read_bytes() == CONTENT[:1000]
    assert get([short, server.plays("/good", serves())], tmp_path).read_bytes() == CONTENT
    assert server.exchanges[-1].range == "bytes=1000-"


@pytest.mark.parametrize("size", [1000, len(CONTENT), len(CONTENT) + 1000], ids=["shorter", "as long", "longer"])
def test_stale_part(server, tmp_path, size):
    """Whatever a .part file holds, a good source's archive comes out whole."""
    part(tmp_path).write_bytes((LIE * 2)[:size])
    assert get(server.plays("/a", serves()), tmp_path).read_bytes() == CONTENT
    assert server.exchanges[-1] == Exchange("/a", None, len(CONTENT))


def test_every_reason_is_told(server, tmp_path):
    urls = [server.plays("/a", says(404)), "mirror.example/without-scheme", server.plays("/b", ignores_range(LIE))]
    with pytest.raises(DownloadError) as caught:
        get(urls, tmp_path)
    told = str(caught.value).split("; ")
    assert [reason.startswith(f"{url}: ") for url, reason in zip(urls, told, strict=True)] == [True] * 3
    assert "unknown url type" in told[1]


def test_no_sources(tmp_path):
    with pytest.raises(DownloadError):
        get([], tmp_path)
    assert names(tmp_path) == []


def test_file_url(tmp_path):
    """A mirror may be a file of this machine, too."""
    mirror = tmp_path / "mirror.tar.gz"
    mirror.write_bytes(CONTENT)
    folder = tmp_path / "data"
    folder.mkdir()
    assert get(mirror.as_uri(), folder).read_bytes() == CONTENT
    assert mirror.read_bytes() == CONTENT


def test_other_files_are_left_alone(server, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "small.tar.gz").write_text("mine too")
    with pytest.raises(DownloadError):
        get(server.plays("/a", ignores_range(LIE)), tmp_path)
    assert names(tmp_path) == ["notes.txt", "small.tar.gz"]
    assert (tmp_path / "small.tar.gz").read_text() == "mine too"


def test_disk_failures_are_not_blamed_on_a_source(server, tmp_path, monkeypatch):
    """Where the folder can't be written no other source would help: the disk's own error comes out."""
    url = server.plays("/a", serves())
    with pytest.raises(OSError, match="No such file"):
        get(url, tmp_path / "missing")

    def full(self, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space left"):
        get([url, url], tmp_path)
    assert len(server.exchanges) == 1


def test_progress_without_a_terminal(server, tmp_path, capsys):
    """A line for the source and one for every tenth, and none of it with show=False."""
    url = server.plays("/a", serves(upto=150_000), serves())
    fetch(ARCHIVE, [url], tmp_path, show=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"downloading {url}"
    assert f"downloading {url}, from byte 150,000 on" in lines
    assert lines[-1] == "  100 % of 0.3 MB"
    part(tmp_path).unlink()
    get(url, tmp_path)
    assert capsys.readouterr() == ("", "")


def test_progress_bar_on_a_terminal(server, tmp_path, monkeypatch, capsys):
    """The bar starts where the partial file ends."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    part(tmp_path).write_bytes(CONTENT[:150_000])
    fetch(ARCHIVE, [server.plays("/a", serves())], tmp_path, show=True)
    drawn = capsys.readouterr().err
    assert "small.tar.gz:  50%" in drawn
    assert "100%" in drawn


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
