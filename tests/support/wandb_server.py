"""As much of a Weights & Biases server as a run needs: it accepts one, may know rows of it, and keeps what it gets."""

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_PROJECT = {"id": "p", "name": "dlm", "entity": {"id": "e", "name": "e"}}


@dataclass
class Server:
    """What it answers and what it heard."""

    known_rows: int = 0
    """Rows that an earlier attempt has left, of steps 0, 1, ..."""
    status: int = 200
    """Of every answer."""
    stops_after_init: bool = False
    """Whether nothing is answered any more once the run is accepted."""
    url: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """The JSON of an answer."""
        if path.endswith("/file_stream"):
            lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.rows += [json.loads(line) for line in lines]
            return {}
        if b"query RunResumeStatus" in body:
            return {"data": {"model": {**_PROJECT, "bucket": self._bucket() if self.known_rows else None}}}
        if b"upsertBucket" in body:
            inserted = not self.known_rows
            return {"data": {"upsertBucket": {"bucket": {**self._bucket(), "project": _PROJECT}, "inserted": inserted}}}
        if b"createRunFiles" in body:
            return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}}
        return {"data": {}}

    def _bucket(self) -> dict[str, Any]:
        last = {"_step": self.known_rows - 1, "train/step": self.known_rows - 1, "_runtime": 1.0}
        return {
            "id": "b",
            "name": "abcdef",
            "displayName": "x",
            "summaryMetrics": json.dumps(last),
            "logLineCount": 0,
            "historyLineCount": self.known_rows,
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(last)]),
            "eventsTail": "[]",
            "config": json.dumps({"lr": {"value": 0.25}}),
            "tags": [],
            "notes": "",
            "wandbConfig": json.dumps({"t": 1}),
        }


@contextlib.contextmanager
def serving(server: Server) -> Iterator[Server]:
    """Serve on a port of this machine, whose address is then ``server.url``."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if server.stops_after_init and self.path.endswith("/file_stream"):
                self.close_connection = True
                return
            answer = json.dumps(server.answer(self.path, body)).encode()
            self.send_response(server.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing on the standard error."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        listener.daemon_threads = True
        server.url = f"http://127.0.0.1:{listener.server_address[1]}"
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown()
            thread.join()
