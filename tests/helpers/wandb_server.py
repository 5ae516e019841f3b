"""A W&B server on this machine: as much of one as W&B's own client asks for, and not always willing to answer.

It speaks what wandb 0.31 was seen to speak: GraphQL to begin, resume and describe a run, and the "file stream", to
which the client posts lines of wandb-history.jsonl and of other files together with the number of the first of them.
"""

import json
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from tests.helpers.processes import run

KEY = "a" * 40
# Whatever W&B sends while tests run goes to a port at which nobody listens.
NOWHERE: dict[str, Any] = {"WANDB_BASE_URL": "http://127.0.0.1:1", "WANDB_ERROR_REPORTING": "false"}

HISTORY, EVENTS, OUTPUT, SUMMARY = "wandb-history.jsonl", "wandb-events.jsonl", "output.log", "wandb-summary.json"


def read_back(folder):
    """The records of the .wandb file in `folder`, as `wandb leet inspect` reads them, by type."""
    (path,) = folder.glob("*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", path]
    done = run(command, folder, WANDB_MODE="offline", **NOWHERE)
    assert done.returncode == 0, done.stderr
    found: dict[str, list] = {}
    for line in done.stdout.splitlines():
        record = json.loads(line)
        found.setdefault(record["type"], []).append(record.get(record["type"]))
    return found


@dataclass
class ServedRun:
    """What the server holds of a run.

    Attributes:
        lines: of each streamed file.
        config: the configuration, in W&B's own form.
        preempting, exit_code: what the client said when it left; begun again, neither.
    """

    lines: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in (HISTORY, EVENTS, OUTPUT)})
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    preempting: bool = False
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows that the charts are drawn from."""
        return [json.loads(line) for line in self.lines[HISTORY]]

    def stream(self, post: dict[str, Any]) -> None:
        """Take in a post to the file stream: what lies at its offsets is replaced, the rest appended."""
        for name, chunk in post.get("files", {}).items():
            if name == SUMMARY:
                self.summary = json.loads(chunk["content"][-1])
                continue
            lines, offset = self.lines[name], chunk["offset"]
            if offset > len(lines):
                raise ValueError(f"{name}: line {offset} comes after line {len(lines) - 1}")
            lines[offset : offset + len(chunk["content"])] = chunk["content"]
        self.preempting |= post.get("preempting", False)
        self.exit_code = post.get("exitcode", self.exit_code)

    def resume_status(self) -> dict[str, Any]:
        """What a client that resumes the run is told."""
        return {
            "summaryMetrics": json.dumps(self.summary),
            "historyLineCount": len(self.lines[HISTORY]),
            "eventsLineCount": len(self.lines[EVENTS]),
            "logLineCount": len(self.lines[OUTPUT]),
            "historyTail": json.dumps(self.lines[HISTORY][-1:]),
            "eventsTail": json.dumps(self.lines[EVENTS][-1:]),
            "config": json.dumps(self.config),
            "wandbConfig": json.dumps({"t": self.config["_wandb"]["value"]["t"]}),
            "tags": [],
            "notes": None,
        }


class WandbServer:
    """A W&B server on a free port of this machine; a context manager.

    Attributes:
        runs: what has been sent, by run id.
        asked: the names of the GraphQL operations asked for, and "file_stream" for each post to it, in order.
        mistakes: what no real server would have accepted; for a test to look at, at its end.
    """

    def __init__(self) -> None:
        self.runs: dict[str, ServedRun] = {}
        self.asked: list[str] = []
        self.mistakes: list[str] = []
        self._changed = threading.Condition()
        self._silent, self._closed = threading.Event(), threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"served": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> "WandbServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def hang(self) -> None:
        """Accept connections from now on, and say nothing."""
        self._silent.set()

    def close(self) -> None:
        """Refuse connections from now on."""
        if not self._closed.is_set():
            self._closed.set()
            self._http.shutdown()
            self._http.server_close()

    def answer(self, path: str, request: bytes) -> dict[str, Any] | None:
        """The answer to a request, or None for none."""
        if self._silent.is_set():
            self._closed.wait()
        if self._closed.is_set():
            return None
        with self._changed:
            try:
                if path == "/graphql":
                    asked = json.loads(request)
                    (operation,) = re.findall(r"^\s*(?:query|mutation) (\w+)", asked["query"])
                    self.asked.append(operation)
                    return self._graphql(operation, asked.get("variables", {}))
                if path.endswith("/file_stream"):
                    self.asked.append("file_stream")
                    self.runs[path.split("/")[-2]].stream(json.loads(request))
                return {}
            except (KeyError, ValueError) as error:
                self.mistakes.append(f"{path}: {type(error).__name__}: {error}")
                raise
            finally:
                self._changed.notify_all()

    def _graphql(self, operation: str, asked: dict[str, Any]) -> dict[str, Any]:
        entity = {"id": "entity", "name": "somebody"}
        if operation == "RunResumeStatus":
            run = self.runs.get(asked["name"])
            bucket = {"id": asked["name"], "name": asked["name"], "displayName": None} if run else None
            if run and bucket:
                bucket |= run.resume_status()
            return {"data": {"model": {"id": "project", "name": asked["project"], "entity": entity, "bucket": bucket}}}
        if operation == "UpsertBucket":
            name = asked["name"]
            inserted = name not in self.runs
            run = self.runs.setdefault(name, ServedRun())
            run.config = json.loads(asked["config"] or "{}")
            bucket = {
                "id": name, "name": name, "displayName": asked["displayName"], "description": "", "sweepName": None,
                "config": json.dumps(run.config), "historyLineCount": 0,
                "project": {"id": "project", "name": asked["project"], "entity": entity},
            }  # fmt: skip
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": inserted}}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in asked["files"]]
            return {"data": {"createRunFiles": {"runID": asked["run"], "uploadHeaders": [], "files": files}}}
        if operation == "Viewer":
            return {"data": {"viewer": {"id": "user", "entity": "somebody", "flags": "{}", "teams": {"edges": []}}}}
        return {"data": None, "errors": [{"message": f"this server does not know of {operation}"}]}


class _Handler(BaseHTTPRequestHandler):
    served: WandbServer

    def do_POST(self) -> None:
        """GraphQL, or lines for the file stream."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = self.served.answer(self.path, body)
        if answer is None:
            return
        reply = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    do_PUT = do_POST  # noqa: N815 - an uploaded file

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a test's output is its own."""
