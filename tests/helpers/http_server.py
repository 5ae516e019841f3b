"""An HTTP server on 127.0.0.1 that serves, truncates, stalls and lies."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Exchange:
    """One request: its path, its Range header, and the bytes of the body that were sent."""

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
        self.exchange.sent += len(content)  # first, so that the count is right when the client has the bytes
        self.wfile.write(content)
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        pass


Behaviour = Callable[[Reply], None]


class Server(ThreadingHTTPServer):
    """A server on which each path plays a script: one behaviour for each request, the last one repeatedly."""

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
        """Ignore clients that hang up on a stalled reply."""

    def plays(self, path: str, *script: Behaviour) -> str:
        """Set the script of `path` and return its URL."""
        self.scripts[path] = list(script)
        return f"http://127.0.0.1:{self.server_port}{path}"

    @property
    def paths(self) -> list[str]:
        return [exchange.path for exchange in self.exchanges]


def serves(content: bytes, upto: int | None = None, then: Behaviour | None = None) -> Behaviour:
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


def says(status: int, content: bytes = b"sorry", kind: str = "text/plain", length: bool = True) -> Behaviour:
    """Send `content`, whatever Range was requested; `length`: with a Content-Length."""

    def behaviour(reply: Reply) -> None:
        reply.head(status, len(content) if length else None, Content_Type=kind)
        reply.body(content)

    return behaviour


def stalls(reply: Reply) -> None:
    """Send nothing more, and keep the connection."""
    reply.server.over.wait(20)
