"""A reverse proxy that does to S3 traffic what networks and half-compatible servers do."""

from __future__ import annotations

import contextlib
import http.client
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from support.s3_servers import S3Server

_HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive"}


@dataclass(frozen=True)
class Request:
    """What the proxy knows of one request."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Faults:
    """What the proxy does. Counters are of requests that still are to meet that fate."""

    strip_conditions: bool = False
    """Forward without ``If-None-Match``, so that the server seems to know no conditions."""
    drop_answers: int = 0
    """Forward, and cut the connection instead of answering."""
    drop_requests: int = 0
    """Cut the connection without forwarding."""
    cut_answers: int = 0
    """Forward, and cut the connection in the midst of the answer's body."""
    holds: Callable[[Request], bool] = lambda request: False
    """Which requests wait, before they are forwarded, until `let_go`."""
    held: list[Request] = field(default_factory=list)
    """Those that did."""
    stall_answers: int = 0
    """Forward, and say nothing until the proxy ends."""
    answer_status: int = 0
    """Answer with this status and an empty body instead of forwarding..."""
    answer_status_times: int = 0
    """...so many times."""
    corrupt_bodies: int = 0
    """Flip one bit of the body before forwarding."""
    matching: Callable[[Request], bool] = lambda request: request.method == "PUT"
    """Which requests the counters above mean."""
    seen: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)
    _let_go: threading.Event = field(default_factory=threading.Event)

    def hold(self, request: Request) -> None:
        """Return at once, or once what is held is let go."""
        if self.holds(request):
            self.held.append(request)
            self._let_go.wait()

    def let_go(self) -> None:
        """Forward what is held, and hold nothing any more."""
        self.holds = lambda request: False
        self._let_go.set()
        self._let_go = threading.Event()

    def take(self, counter: str, request: Request) -> bool:
        """Whether this request is to meet the fate that `counter` counts."""
        with self.lock:
            if not self.matching(request) or getattr(self, counter) <= 0:
                return False
            setattr(self, counter, getattr(self, counter) - 1)
            return True


@contextlib.contextmanager
def s3_proxy(
    upstream: S3Server, *, certificate: Path | None = None
) -> Iterator[tuple[S3Server, Faults]]:
    """Run a proxy before `upstream`; the faults can be changed while it runs.

    With a `certificate` (a file with its key as well) it speaks TLS.
    """
    faults = Faults()
    address = urlsplit(upstream.endpoint).netloc
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(address, faults))
    server.daemon_threads = True
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        scheme = "http" if certificate is None else "https"
        yield S3Server(f"{scheme}://127.0.0.1:{server.server_address[1]}"), faults
    finally:
        faults.ended.set()
        faults.let_go()
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(upstream: str, faults: Faults) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            request = Request(self.command, self.path, dict(self.headers.items()))
            body = self._body()
            faults.seen.append(request)
            faults.hold(request)
            if faults.take("drop_requests", request):
                self.close_connection = True
                return
            if faults.take("answer_status_times", request):
                self._answer(faults.answer_status, {}, b"")
                return
            if body and faults.take("corrupt_bodies", request):
                middle = len(body) // 2
                body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
            status, headers, answer = self._forward(body)
            if faults.take("drop_answers", request):
                self.close_connection = True
                return
            if faults.take("stall_answers", request):
                faults.ended.wait()
                self.close_connection = True
                return
            self._answer(status, headers, answer, cut=faults.take("cut_answers", request))

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815

        def _body(self) -> bytes:
            if "100-continue" in self.headers.get("Expect", "").lower():
                # http.server has answered "continue" already, in `handle_expect_100`.
                del self.headers["Expect"]
            if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
                return b"".join(iter(self._chunk, b""))
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _chunk(self) -> bytes:
            size = int(self.rfile.readline().split(b";")[0], 16)
            data = self.rfile.read(size)
            self.rfile.readline()
            return data

        def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP_BY_HOP}
            if faults.strip_conditions:
                headers = {k: v for k, v in headers.items() if k.lower() != "if-none-match"}
            headers["Content-Length"] = str(len(body))
            connection = http.client.HTTPConnection(upstream, timeout=60)
            try:
                connection.request(self.command, self.path, body=body, headers=headers)
                answer = connection.getresponse()
                return answer.status, dict(answer.getheaders()), answer.read()
            finally:
                connection.close()

        def _answer(
            self, status: int, headers: dict[str, str], body: bytes, *, cut: bool = False
        ) -> None:
            self.send_response_only(status)
            lengths = {k: v for k, v in headers.items() if k.lower() == "content-length"}
            for key, value in headers.items():
                if key.lower() not in {*_HOP_BY_HOP, "content-length"}:
                    self.send_header(key, value)
            # The answer to a HEAD tells the length of the body that it leaves out.
            length = next(iter(lengths.values()), "0") if self.command == "HEAD" else len(body)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = self.close_connection or cut

        def log_message(self, format: str, *args: object) -> None:
            """Keep the tests' output clean."""

    return Handler
