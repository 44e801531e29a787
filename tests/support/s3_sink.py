"""An S3 server that takes uploads and forgets them, for benchmarks of a client.

A real server on the same two processors needs several times what a client needs, and so would be
what is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from support.s3_link import CutError, Head, Stream, listen

_FOUND = (
    "<ListBucketResult><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>"
)
_BEGUN = "<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
_DONE = '<CompleteMultipartUploadResult><ETag>"0"</ETag></CompleteMultipartUploadResult>'


@contextlib.contextmanager
def s3_sink() -> Iterator[str]:
    """Run a sink in a process of its own; gives its URL."""
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.send_signal(signal.SIGKILL)


class _Sink:
    """Remembers how long each object is, and nothing of what is in it."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._parts: dict[str, int] = {}

    async def run(self) -> None:
        asyncio.get_running_loop().add_reader(sys.stdin, sys.exit)  # its parent is gone
        await listen(self.serve)

    async def serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(CutError, ConnectionError):
            stream = Stream(sock)
            while text := await stream.until(b"\r\n\r\n"):
                request = Head(text)
                if request.expects:
                    await stream.send(b"HTTP/1.1 100 Continue\r\n\r\n")
                await stream.pass_on(request.size, None)
                await stream.send(self._answer(request))

    def _answer(self, request: Head) -> bytes:
        method, target, _ = request.first.decode().split(" ")
        url = urlsplit(target)
        query = parse_qs(url.query, keep_blank_values=True)
        if method == "HEAD":
            size = self._sizes.get(url.path)
            return _response(404) if size is None else _response(200, length=size)
        if method == "PUT" and "partNumber" in query:
            self._parts[url.path] = self._parts.get(url.path, 0) + request.size
        elif method == "PUT":
            self._sizes[url.path] = request.size
        elif method == "POST" and "uploads" in query:
            return _response(200, _BEGUN)
        elif method == "POST":
            self._sizes[url.path] = self._parts.pop(url.path, 0)
            return _response(200, _DONE)
        elif method == "DELETE":
            self._sizes.pop(url.path, None)
            return _response(204)
        return _response(200, _FOUND if method == "GET" else "")


def _response(status: int, body: str = "", *, length: int | None = None) -> bytes:
    head = (
        f'HTTP/1.1 {status} X\r\nETag: "0"\r\nContent-Type: application/xml\r\n'
        f"Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    return (head + body).encode()


if __name__ == "__main__":
    asyncio.run(_Sink().run())
