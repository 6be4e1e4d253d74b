"""A local server that speaks as a hub does."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories by OWNER/NAME, each a folder served at `main` and at one commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, tuple[Path, str]] = {}
        self.gated: set[str] = set()
        self.broken: set[str] = set()
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        owner, name, _, revision, *rest = [*self.path.strip("/").split("/"), "", "", "", ""]
        repo, file = f"{owner}/{name}", "/".join(part for part in rest if part)
        if repo in self.server.broken:
            return self.reply(500, {}, b"")
        if repo in self.server.gated:
            return self.reply(401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask for access"}, b"")
        if repo not in self.server.repos:
            return self.reply(401, {"X-Error-Code": "RepoNotFound"}, b"")
        folder, commit = self.server.repos[repo]
        if revision not in ("main", commit):
            return self.reply(404, {"X-Error-Code": "RevisionNotFound"}, b"")
        path = folder / file
        if not path.is_file():
            return self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b"")
        content = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
        return self.reply(200, headers, content, with_body=with_body)

    def reply(self, status: int, headers: dict[str, str], content: bytes, *, with_body: bool = True) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Say nothing on stderr."""


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers until the end of the block."""
    server = Hub()
    # Asked often whether to end: a test should not wait for that.
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
