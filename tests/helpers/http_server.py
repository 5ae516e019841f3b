"""An HTTP server on 127.0.0.1 that serves, truncates, stalls and lies."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Reply(BaseHTTPRequestHandler):
    """One answer; the behaviours below drive it."""

    server: "Server"

    def do_GET(self) -> None:
        self.start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.server.requests.append((self.path, self.start))
        script = self.server.scripts[self.path]
        behaviour = script.pop(0) if len(script) > 1 else script[0]
        behaviour(self)

    def send(self, status: int, content: bytes, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
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
        self.over = threading.Event()
        self.requests: list[tuple[str, int]] = []  # the path of each, and the first byte that it asked for
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


def serves(content: bytes, upto: int | None = None, then: Behaviour | None = None) -> Behaviour:
    """Serve what is asked for of `content`; with `upto`, send that many bytes, then do `then`, then close."""

    def behaviour(reply: Reply) -> None:
        rest = content[reply.start :]
        if not rest:
            reply.send(416, b"", Content_Length=0)
            return
        place = f"bytes {reply.start}-{len(content) - 1}/{len(content)}"
        reply.send(206, rest[:upto], Content_Length=len(rest), Content_Range=place)
        if then is not None:
            then(reply)

    return behaviour


def says(status: int, content: bytes = b"sorry", kind: str = "text/plain") -> Behaviour:
    """Send `content`, whatever range was asked for and without its length."""
    return lambda reply: reply.send(status, content, Content_Type=kind)


def stalls(reply: Reply) -> None:
    """Send nothing more, and keep the connection."""
    reply.server.over.wait(20)
