"""A gate before an MLflow server that lets through only who shows a token."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import requests

_UNAUTHORIZED = 401


class Gate:
    """How many requests it let through, and how many not.

    Attributes
    ----------
    url
        Where clients knock.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.passed = 0
        self.refused = 0


@contextmanager
def token_gate(upstream: str, token: str) -> Iterator[Gate]:
    """Run a gate before the server at `upstream`, for bearers of `token`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    gate = Gate(f"http://127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass = _handler(upstream, token, gate)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield gate
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(upstream: str, token: str, gate: Gate) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Authorization") != f"Bearer {token}":
                gate.refused += 1
                self.reply(_UNAUTHORIZED, "text/plain", b"who are you?")
                return
            gate.passed += 1
            answer = requests.request(
                self.command,
                upstream + self.path,
                data=body,
                headers={"Content-Type": self.headers.get("Content-Type", "")},
                timeout=60,
            )
            kind = answer.headers.get("Content-Type", "")
            self.reply(answer.status_code, kind, answer.content)

        def reply(self, status: int, kind: str, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing."""

    return Handler
