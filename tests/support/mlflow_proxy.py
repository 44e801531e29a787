"""A proxy before an MLflow server that loses answers, carries requests out late, or answers what
no MLflow does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import requests


@dataclass(frozen=True)
class Reply:
    """What every request gets in place of the server's answer.

    Attributes
    ----------
    status, content_type, body
        Of an answer, for a request that never reaches the server.
    cuts
        The request is carried out, and the server's answer ends in its midst.
    hangs
        There is none, for as long as this reply is given.
    """

    status: int = 200
    content_type: str = "application/json"
    body: bytes = b"{}"
    cuts: bool = False
    hangs: bool = False


class Faults:
    """What happens to the requests that pass, counted from 1.

    Attributes
    ----------
    lose_answer_to
        Number of the request that is carried out, but never answered.
    hold_back
        Number of the request that is not answered, and carried out by `release` only.
    """

    def __init__(self) -> None:
        self.reset()
        self._reply: Reply | None = None
        self._changed = threading.Event()

    @property
    def reply(self) -> Reply | None:
        """What all requests get from now on; ``None`` for the server's own answers."""
        return self._reply

    @reply.setter
    def reply(self, reply: Reply | None) -> None:
        before, self._changed = self._changed, threading.Event()
        self._reply = reply
        before.set()

    def wait_for_change(self) -> None:
        """Return once another `reply` is set."""
        self._changed.wait()

    def reset(self, *, lose_answer_to: int = 0, hold_back: int = 0) -> None:
        """Start counting anew."""
        self.seen: list[str] = []
        self.lose_answer_to = lose_answer_to
        self.hold_back = hold_back
        self._held: list[Callable[[], object]] = []

    def release(self) -> int:
        """Carry out what was held back; returns how many requests that were."""
        held, self._held = self._held, []
        for request in held:
            request()
        return len(held)

    def pass_on(self, path: str, send: Callable[[], requests.Response]) -> requests.Response | None:
        """The server's answer, or None where the client is to get none."""
        self.seen.append(path)
        number = len(self.seen)
        if number == self.hold_back:
            self._held.append(send)
            return None
        answer = send()
        return None if number == self.lose_answer_to else answer


@contextmanager
def mlflow_proxy(upstream: str) -> Iterator[tuple[str, Faults]]:
    """Run a proxy before the server at `upstream`; yields its URL and its faults."""
    faults = Faults()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(upstream, faults))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", faults
    finally:
        faults.reply = None
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(upstream: str, faults: Faults) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {k: v for k, v in self.headers.items() if k.lower() not in _OWN_HEADERS}
            method, url = self.command, upstream + self.path

            def send() -> requests.Response:
                return requests.request(method, url, data=body, headers=headers, timeout=60)

            reply = faults.reply
            if reply is not None and reply.hangs:
                faults.wait_for_change()
                self.close_connection = True
                return
            if reply is not None and not reply.cuts:
                self.answer(reply.status, reply.content_type, reply.body)
                return
            answer = faults.pass_on(self.path, send)
            if answer is None:
                self.close_connection = True
                return
            kind = answer.headers.get("Content-Type", "")
            self.answer(answer.status_code, kind, answer.content, cut=reply is not None)

        def answer(self, status: int, kind: str, body: bytes, *, cut: bool = False) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = self.close_connection or cut

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            """Keep the tests' output clean."""

    return Handler


_OWN_HEADERS = {"host", "connection", "content-length", "accept-encoding"}
