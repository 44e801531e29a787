"""Reading objects of S3, whole or in ranges; what is cut off goes on where it was cut.

So does an answer that comes too slowly. `StreamingBody.read` and `readinto` wait for all the bytes
they are asked for, and time-outs of the connection hold for each wait of its socket: a byte every
few seconds would keep them for ever. `urllib3.HTTPResponse.read1` returns after one such wait.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ckpt_tasks.errors import CorruptCheckpointError, StoreError
from ckpt_tasks.store.deadline import LeastRate
from ckpt_tasks.store.retry import http_status, retry
from ckpt_tasks.store.s3_client import CONNECTIONS, S3Client, is_transient

__all__ = ["download", "download_range"]

_PIECE_BYTES = 1024 * 1024  # at most; more than a socket has at once


def download(client: S3Client, target: dict[str, Any], shown: str, limit: int | None) -> bytes:
    """The whole object.

    Parameters
    ----------
    target
        ``Bucket`` and ``Key``.
    shown
        The object's name in messages.
    limit
        Raises `CorruptCheckpointError` for an object of more bytes, before they are read.
    """

    def read() -> bytes:
        answer = client.call_once("get_object", **target)
        with contextlib.closing(answer["Body"]) as body:
            size = int(answer["ContentLength"])
            if limit is not None and size > limit:
                raise CorruptCheckpointError(
                    f"{shown} has {size} bytes, more than the {limit} it may have"
                )
            return b"".join(_pieces(body, size))

    return retry(read, is_transient)


def download_range(
    client: S3Client,
    target: dict[str, Any],
    shown: str,
    start: int,
    stop: int,
    buffer: memoryview | None = None,
) -> memoryview:
    """Bytes `start` to `stop` (exclusive) in the beginning of `buffer`, which is returned.

    Without a `buffer` one is made, once the server has said that the object is so long.

    Raises
    ------
    CorruptCheckpointError
        The object ends before `stop`.
    """
    if start == stop:
        _check_end(shown, start, stop, _size(client, target))
        return memoryview(b"")
    done = 0

    def go_on() -> memoryview:
        nonlocal done, buffer
        answer = client.call_once("get_object", **target, Range=f"bytes={start + done}-{stop - 1}")
        with contextlib.closing(answer["Body"]) as body:
            _check_end(shown, start, stop, _whole_size(answer, shown, start + done))
            buffer = memoryview(bytearray(stop - start)) if buffer is None else buffer
            for piece in _pieces(body, stop - start - done):
                buffer[done : done + len(piece)] = piece
                done += len(piece)
        return buffer

    try:
        return retry(go_on, is_transient)
    except OSError as error:
        if http_status(error) != 416:  # the range begins behind the object's end
            raise
        _check_end(shown, start, stop, _size(client, target))
        raise


def _pieces(body: Any, size: int) -> Iterator[bytes]:
    """The `size` bytes of an answer, as they come.

    Raises
    ------
    ConnectionError
        It ended early.
    TooSlowError
        They come at less than the least rate.
    """
    rate, done = LeastRate(CONNECTIONS), 0
    with body as raw:
        while done < size:
            rate.check(done)
            piece = raw.read1(min(_PIECE_BYTES, size - done))
            if not piece:
                raise ConnectionError(f"the answer ended {size - done} bytes early")
            yield piece
            done += len(piece)


def _check_end(shown: str, start: int, stop: int, size: int) -> None:
    if stop > size:
        raise CorruptCheckpointError(
            f"{shown} ends after {size} bytes; bytes {start} to {stop} were asked for"
        )


def _whole_size(answer: Any, shown: str, start: int) -> int:
    """The object's size, from an answer that begins with byte `start`."""
    if "ContentRange" in answer:  # bytes 0-9/100
        return int(answer["ContentRange"].rpartition("/")[2])
    if start:
        raise StoreError(f"the server of {shown} answers a range with the whole object")
    return int(answer["ContentLength"])


def _size(client: S3Client, target: dict[str, Any]) -> int:
    return int(client.call("head_object", **target)["ContentLength"])
