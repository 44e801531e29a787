"""A slow and flaky link to an S3 server: a proxy in a process of its own.

It delays each request, caps the bandwidth of each connection, and does to a share of the requests
what networks and busy servers do. Which requests those are, a seeded generator decides. For faults
that must meet one particular request there is `support.s3_proxy`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

PIECE_BYTES = 256 * 1024
_SLOW_DOWN = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n%s"
)
_SLOW_DOWN_BODY = b"<Error><Code>SlowDown</Code><Message>Please reduce your rate.</Message></Error>"
_MUTED = {b"expect", b"connection"}
_TRICKLE_SECONDS = 0.1  # between two bytes
FATES = ("busy", "cut", "drop_answer", "corrupt", "trickle")


@dataclass(frozen=True, kw_only=True)
class Link:
    """What a link is like. Shares are of requests, from 0 to 1."""

    delay: float = 0.0
    """Seconds before a request is passed on."""
    bandwidth: float = 0.0
    """Bytes per second of one connection in each direction; 0 for no cap."""
    busy: float = 0.0
    """Share that is answered with 503 ``SlowDown``, and not passed on."""
    cut: float = 0.0
    """Share whose connection is cut in the midst of the body, the request's or the answer's."""
    drop_answer: float = 0.0
    """Share that the server acts upon, and whose connection is cut instead of the answer."""
    corrupt: float = 0.0
    """Share of requests with a body of which one bit is flipped on the way."""
    trickle: float = 0.0
    """Share whose answer comes a byte at a time: its body, or all of it where that is empty."""
    seed: int = 0


class RunningLink:
    """A link at work: `endpoint` stands for the server's, `fates` counts what was done."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout
        self.endpoint = f"http://127.0.0.1:{int(self._stdout.readline())}"

    def fates(self) -> Counter[str]:
        """Requests so far, by what became of them."""
        return self._ask(b"\n")

    def become(self, link: Link) -> None:
        """What the link is like from now on, also for connections that are open."""
        self._ask(json.dumps(asdict(link)).encode() + b"\n")

    def _ask(self, line: bytes) -> Counter[str]:
        self._stdin.write(line)
        self._stdin.flush()
        return Counter(json.loads(self._stdout.readline()))


@contextlib.contextmanager
def s3_link(upstream: str, link: Link) -> Iterator[RunningLink]:
    """Run a link to the server at the URL `upstream`."""
    with subprocess.Popen(
        [sys.executable, __file__, upstream, json.dumps(asdict(link))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            yield RunningLink(process)
        finally:
            process.send_signal(signal.SIGKILL)


class CutError(Exception):
    """The connection is to end here."""


class _Pace:
    """Keeps one direction of one connection to a bandwidth."""

    def __init__(self, bandwidth: float) -> None:
        self._bandwidth = bandwidth
        self._due = 0.0

    async def spend(self, size: int) -> None:
        if not self._bandwidth:
            return
        now = asyncio.get_running_loop().time()
        self._due = max(self._due, now) + size / self._bandwidth
        if self._due - now > 0.001:
            await asyncio.sleep(self._due - now)


class Stream:
    """One connection's incoming bytes, and where else they go."""

    def __init__(self, sock: socket.socket, bandwidth: float = 0.0) -> None:
        self.sock = sock
        self.pace = _Pace(bandwidth)
        self._loop = asyncio.get_running_loop()
        self._memory = memoryview(bytearray(PIECE_BYTES))
        self._read = self._memory[:0]  # received, not yet taken

    async def send(self, data: Any) -> None:
        await self._loop.sock_sendall(self.sock, data)

    async def until(self, mark: bytes) -> bytes:
        """Up to and including `mark`; nothing where the other side is gone."""
        text = b""
        while mark not in text:
            if not self._read and not await self._receive():
                return b""
            text += bytes(self._read)
            self._read = self._memory[:0]
        text, _, rest = text.partition(mark)
        self._memory[: len(rest)] = rest
        self._read = self._memory[: len(rest)]
        return text + mark

    async def pass_on(self, size: int, to: Stream | None, flip: int = -1) -> None:
        """Pass on `size` bytes, with one bit flipped at offset `flip`, at this stream's pace."""
        done = 0
        while done < size:
            if not self._read and not await self._receive():
                raise CutError
            piece = self._read[: size - done]
            self._read = self._read[piece.nbytes :]
            if done <= flip < done + piece.nbytes:
                piece[flip - done] ^= 1
            await self.pace.spend(piece.nbytes)
            if to is not None:
                await to.send(piece)
            done += piece.nbytes

    async def pass_chunks(self, to: Stream | None) -> None:
        """A body in the chunked transfer encoding."""
        size = -1
        while size:
            line = await self.until(b"\r\n")
            size = int(line.split(b";")[0], 16)
            if to is not None:
                await to.send(line)
            await self.pass_on(size + 2, to)

    async def _receive(self) -> bool:
        with contextlib.suppress(ConnectionError):
            size = await self._loop.sock_recv_into(self.sock, self._memory)
            self._read = self._memory[:size]
        return bool(self._read)


class _Trickle(Stream):
    """Where bytes go one at a time."""

    def __init__(self, to: Stream) -> None:
        super().__init__(to.sock)

    async def send(self, data: Any) -> None:
        for byte in bytes(data):
            await super().send(bytes([byte]))
            await asyncio.sleep(_TRICKLE_SECONDS)


class Head:
    """The first lines of a request or an answer."""

    def __init__(self, text: bytes) -> None:
        self.first, *lines = text.removesuffix(b"\r\n\r\n").split(b"\r\n")
        self._lines = [line for line in lines if line.partition(b":")[0].lower() not in _MUTED]
        fields = (line.partition(b":") for line in lines)
        self._fields = {name.lower(): value.strip() for name, _, value in fields}
        self.size = int(self._fields.get(b"content-length", 0))
        self.chunked = b"chunked" in self._fields.get(b"transfer-encoding", b"").lower()
        self.expects = b"100-continue" in self._fields.get(b"expect", b"").lower()

    def text(self) -> bytes:
        return b"\r\n".join([self.first, *self._lines]) + b"\r\n\r\n"


async def listen(serve: Callable[[socket.socket], Coroutine[Any, Any, None]]) -> None:
    """Print a port, and serve each connection to it for ever."""
    loop = asyncio.get_running_loop()
    server = socket.create_server(("127.0.0.1", 0), backlog=256)
    # What lies in the system's buffers has passed no cap.
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, PIECE_BYTES)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIECE_BYTES)
    server.setblocking(False)
    print(server.getsockname()[1], flush=True)
    tasks = set()
    while True:
        sock, _ = await loop.sock_accept(server)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = loop.create_task(serve(sock))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


class _Proxy:
    def __init__(self, upstream: str, link: Link) -> None:
        url = urlsplit(upstream)
        self._upstream = (url.hostname or "", url.port or 80)
        self._link = link
        self._random = random.Random(link.seed)  # noqa: S311 - chooses faults
        self.fates: Counter[str] = Counter()

    async def run(self) -> None:
        asyncio.get_running_loop().add_reader(sys.stdin, self._tell)
        await listen(self._serve)

    def _tell(self) -> None:
        line = sys.stdin.readline()
        if not line:
            raise SystemExit
        if line.strip():
            self._link = Link(**json.loads(line))
        print(json.dumps(self.fates), flush=True)

    async def _serve(self, sock: socket.socket) -> None:
        upstream = socket.socket()
        with sock, upstream, contextlib.suppress(CutError, ConnectionError):
            upstream.setblocking(False)
            upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().sock_connect(upstream, self._upstream)
            client = Stream(sock, self._link.bandwidth)
            server = Stream(upstream, self._link.bandwidth)
            while text := await client.until(b"\r\n\r\n"):
                await self._exchange(client, server, Head(text))

    async def _exchange(self, client: Stream, server: Stream, request: Head) -> None:
        fate = self._fate(request)
        self.fates[fate] += 1
        await asyncio.sleep(self._link.delay)
        if request.expects:
            await client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            await asyncio.sleep(self._link.delay)
        if fate == "busy":
            await self._pass_body(client, None, request)
            await client.send(_SLOW_DOWN % (len(_SLOW_DOWN_BODY), _SLOW_DOWN_BODY))
            return
        await server.send(request.text())
        if fate == "cut" and request.size:
            await client.pass_on(request.size // 2, server)
            raise CutError
        flip = request.size // 2 if fate == "corrupt" else -1
        await self._pass_body(client, server, request, flip)
        await self._answer(client, server, request, fate)

    async def _answer(self, client: Stream, server: Stream, request: Head, fate: str) -> None:
        text = await server.until(b"\r\n\r\n")
        if not text:
            raise CutError
        answer = Head(text)
        status = int(answer.first.split()[1])
        if request.first.startswith(b"HEAD ") or status in (204, 304):
            answer.size, answer.chunked = 0, False
        if fate == "drop_answer":
            await self._pass_body(server, None, answer)
            raise CutError
        to = _Trickle(client) if fate == "trickle" else client
        if answer.size or answer.chunked:
            await client.send(answer.text())
        else:
            await to.send(answer.text())
        if fate == "cut":
            await server.pass_on(answer.size // 2, client)
            raise CutError
        await self._pass_body(server, to, answer)

    async def _pass_body(
        self, source: Stream, to: Stream | None, head: Head, flip: int = -1
    ) -> None:
        if head.chunked:
            await source.pass_chunks(to)
        else:
            await source.pass_on(head.size, to, flip)

    def _fate(self, request: Head) -> str:
        drawn = self._random.random()
        for fate in FATES:
            drawn -= getattr(self._link, fate)
            if drawn < 0 and (fate != "corrupt" or request.size):
                return fate
        return "passed"


if __name__ == "__main__":
    asyncio.run(_Proxy(sys.argv[1], Link(**json.loads(sys.argv[2]))).run())
