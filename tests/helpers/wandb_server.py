"""A W&B server in this process: as much as wandb 0.31 asks of one to start, resume and stream a run.

A run begins and resumes by GraphQL. Its metrics come by the "file stream": posts of lines of wandb-history.jsonl and
other files, with the number of the first line.
"""

import json
import re
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "a" * 40
# An address at which nothing listens.
NOWHERE: dict[str, Any] = {"WANDB_BASE_URL": "http://127.0.0.1:1", "WANDB_ERROR_REPORTING": "false"}

ENTITY = {"id": "entity", "name": "somebody"}


class ServedRun:
    """A run as the server has it: lines of each streamed file, summary, configuration, and how the client left."""

    def __init__(self) -> None:
        self.lines: dict[str, list[str]] = defaultdict(list)
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.preempting, self.exit_code = False, None

    @property
    def history(self) -> list[dict[str, Any]]:
        """Return the rows that the charts are drawn from."""
        return [json.loads(line) for line in self.lines["wandb-history.jsonl"]]

    def stream(self, post: dict[str, Any]) -> None:
        """Replace the lines at a post's offsets, and append the rest."""
        files = post.get("files", {})
        if summary := files.pop("wandb-summary.json", None):
            self.summary = json.loads(summary["content"][-1])
        for name, chunk in files.items():
            lines, offset = self.lines[name], chunk["offset"]
            if offset > len(lines):
                raise ValueError(f"{name}: line {offset} comes after line {len(lines) - 1}")
            lines[offset : offset + len(chunk["content"])] = chunk["content"]
        self.preempting |= post.get("preempting", False)
        self.exit_code = post.get("exitcode", self.exit_code)

    def resume_status(self) -> dict[str, Any]:
        """Return what a client that resumes the run asks for."""
        history, events = self.lines["wandb-history.jsonl"], self.lines["wandb-events.jsonl"]
        return {
            "summaryMetrics": json.dumps(self.summary), "config": json.dumps(self.config), "tags": [], "notes": None,
            "historyLineCount": len(history), "historyTail": json.dumps(history[-1:]),
            "eventsLineCount": len(events), "eventsTail": json.dumps(events[-1:]),
            "logLineCount": len(self.lines["output.log"]),
            "wandbConfig": json.dumps({"t": self.config["_wandb"]["value"]["t"]}),
        }  # fmt: skip


class WandbServer:
    """A W&B server on a free port, with its runs by ID and what a real one would have refused; a context manager."""

    def __init__(self) -> None:
        self.runs: dict[str, ServedRun] = {}
        self.mistakes: list[str] = []
        self._lock = threading.Lock()
        self._silent, self._closed = threading.Event(), threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"served": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> "WandbServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def hang(self) -> None:
        """Accept connections from now on, but do not answer."""
        self._silent.set()

    def close(self) -> None:
        """Refuse connections from now on."""
        if not self._closed.is_set():
            self._closed.set()
            self._http.shutdown()
            self._http.server_close()

    def answer(self, path: str, request: bytes) -> dict[str, Any] | None:
        """Return the answer to a request; None for none."""
        if self._silent.is_set():
            self._closed.wait()
        if self._closed.is_set():
            return None
        with self._lock:
            try:
                if path == "/graphql":
                    query = json.loads(request)
                    (operation,) = re.findall(r"^\s*(?:query|mutation) (\w+)", query["query"])
                    data = self._graphql(operation, query.get("variables", {}))
                    return {"data": data, "errors": [] if data else [{"message": f"unknown operation {operation}"}]}
                if path.endswith("/file_stream"):
                    self.runs[path.split("/")[-2]].stream(json.loads(request))
                return {}
            except (KeyError, ValueError) as error:
                self.mistakes.append(f"{path}: {type(error).__name__}: {error}")
                raise

    def _graphql(self, operation: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        name = variables.get("name", "")
        if operation == "RunResumeStatus":
            run = self.runs.get(name)
            bucket = run and {"id": name, "name": name, **run.resume_status()}
            return {"model": {"id": "project", "name": variables["project"], "entity": ENTITY, "bucket": bucket}}
        if operation == "UpsertBucket":
            is_new = name not in self.runs
            run = self.runs.setdefault(name, ServedRun())
            run.config = json.loads(variables["config"] or "{}")
            project = {"id": "project", "name": variables["project"], "entity": ENTITY}
            bucket = {"id": name, "name": name, "displayName": variables["displayName"], "project": project,
                      "config": json.dumps(run.config), "historyLineCount": 0}  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        if operation == "Viewer":
            return {"viewer": {"id": "user", "entity": "somebody", "flags": "{}", "teams": {"edges": []}}}
        return None


class _Handler(BaseHTTPRequestHandler):
    served: WandbServer

    def do_POST(self) -> None:
        answer = self.served.answer(self.path, self.rfile.read(int(self.headers.get("Content-Length", 0))))
        if answer is not None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

    do_PUT = do_POST  # noqa: N815 - an uploaded file

    def log_message(self, format: str, *args: Any) -> None:
        pass
