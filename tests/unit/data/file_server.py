"""A real HTTP server of a folder on loopback that counts what it is asked for and fails as it is told."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest


class FileServer(ThreadingHTTPServer):
    """Serves `folder` at `url`.

    Attributes:
        asked: how often each "GET /path" and "HEAD /path" came, without queries.
        queries, headers: of the last request of a path.
        faults: for a path what its next GETs do instead of answering: a status, "cut" (half of the body, then the end),
            "stall" (half of the body, then silence until `go_on` is set).
        refuse_head: answer HEAD with 403, as to an address that is signed for GET.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: Counter[str] = Counter()
        self.queries: dict[str, str] = {}
        self.headers: dict[str, Any] = {}
        self.faults: dict[str, list[int | str]] = {}
        self.refuse_head = False
        self.go_on = threading.Event()
        self.counting = threading.Lock()

    def handle_error(self, *_: object) -> None:
        """Clients that were killed leave broken connections behind: say nothing."""


class _Handler(SimpleHTTPRequestHandler):
    server: FileServer

    def do_HEAD(self) -> None:
        self._count()
        if self.server.refuse_head:
            self.send_error(403)
        else:
            super().do_HEAD()

    def do_GET(self) -> None:
        path = self._count()
        with self.server.counting:
            faults = self.server.faults.get(path)
            fault = faults.pop(0) if faults else None
        if fault is None:
            super().do_GET()
        elif isinstance(fault, int):
            self.send_error(fault)
        else:
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if fault == "stall":
                self.server.go_on.wait(60)

    def _count(self) -> str:
        parts = urlsplit(self.path)
        with self.server.counting:
            self.server.asked[f"{self.command} {parts.path}"] += 1
            self.server.queries[parts.path] = parts.query
            self.server.headers[parts.path] = self.headers
        return parts.path

    def log_message(self, *_: object) -> None:
        """Tests look at the counts."""


@contextmanager
def serving(folder: Path) -> Iterator[FileServer]:
    """A server of `folder` for the length of the context."""
    server = FileServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NO_PROXY", "127.0.0.1")
            yield server
    finally:
        server.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join()
