"""Reading objects of S3, whole or in ranges; what is cut off goes on where it was cut."""

from __future__ import annotations

import contextlib
from typing import Any

from ckpt_tasks.errors import CorruptCheckpointError, StoreError
from ckpt_tasks.store.object import http_status
from ckpt_tasks.store.s3_client import S3Client, retry

__all__ = ["download", "download_range"]

_PIECE_BYTES = 1024 * 1024  # what botocore copies once more fits a processor's cache


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
            return bytes(body.read())

    return retry(read)


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
            while done < stop - start:
                taken = body.readinto(buffer[done : min(done + _PIECE_BYTES, stop - start)])
                if not taken:
                    raise ConnectionError(f"the answer ended {stop - start - done} bytes early")
                done += taken
        return buffer

    try:
        return retry(go_on)
    except OSError as error:
        if http_status(error) != 416:  # the range begins behind the object's end
            raise
        _check_end(shown, start, stop, _size(client, target))
        raise


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
