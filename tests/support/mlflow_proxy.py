"""A proxy before an MLflow server that loses answers, or carries requests out late."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import requests


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

            answer = faults.pass_on(self.path, send)
            if answer is None:
                self.close_connection = True
                return
            self.send_response(answer.status_code)
            self.send_header("Content-Type", answer.headers.get("Content-Type", ""))
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            """Keep the tests' output clean."""

    return Handler


_OWN_HEADERS = {"host", "connection", "content-length", "accept-encoding"}
