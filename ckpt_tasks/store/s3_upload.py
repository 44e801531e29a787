"""Upload of one data object to S3: in one request, or in parts of which many are under way.

Each part carries its CRC-32, which the server compares before it keeps the part. A server that
does not know that header (it then leaves it out of its answer) tells the part's MD5 as its ETag,
which is compared here. See "Checking object integrity" and "Uploading and copying objects using
multipart upload" in the Amazon S3 user guide.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import re
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from ckpt_tasks.errors import StoreError
from ckpt_tasks.store.deadline import LeastRate
from ckpt_tasks.store.retry import http_status, retry
from ckpt_tasks.store.s3_client import CONNECTIONS, S3Client, is_transient
from ckpt_tasks.store.s3_download import download

__all__ = ["OldUpload", "abort_upload", "old_uploads", "upload"]

_PART_BYTES = 8 * 1024 * 1024
_MAX_PARTS = 10_000  # S3's limit, as is the next
_LISTED_AT_ONCE = 1000
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')
_ENCRYPTION = ("ServerSideEncryption", "SSECustomerAlgorithm", "SSEKMSKeyId")

_Target = dict[str, Any]  # bucket and key, as arguments of a request
_Part = dict[str, Any]  # as the completion of an upload names it


class OldUpload(NamedTuple):
    """One that was begun and never completed, and when."""

    key: str
    upload_id: str
    begun: datetime


def upload(
    client: S3Client, target: _Target, parts: Iterable[Any], size: int, *, replaces: bool = False
) -> None:
    """Make an object of the `size` bytes of `parts`, where none is.

    Takes no more memory than the parts under way, one more, and only for those that do not lie
    in one piece of the caller's memory.

    Parameters
    ----------
    target
        ``Bucket`` and ``Key``. The key contains a write-id, so nobody else writes to it.
    replaces
        An object may be there, or be written by others meanwhile: this one takes its place.

    Raises
    ------
    FileExistsError
        There is another object.
    StoreError
        `parts` have not `size` bytes.
    OSError
        The server failed, and so did further tries. What was uploaded is removed where it still
        answers.
    """
    blocks = _blocks(parts, size, max(_PART_BYTES, -(-size // _MAX_PARTS)))
    condition = {} if replaces else {"IfNoneMatch": "*"}
    if size <= _PART_BYTES:
        _upload_whole(client, target, next(blocks, memoryview(b"")), condition)
    else:
        _upload_parts(client, target, blocks, size, condition)


def old_uploads(client: S3Client, bucket: str, prefix: str, older_than: float) -> list[OldUpload]:
    """The uploads below `prefix` that were begun more than `older_than` seconds ago, by the
    server's clock alone.
    """
    return [
        OldUpload(str(found["Key"]), str(found["UploadId"]), found["Initiated"])
        for found, now in _uploads_under_way(client, bucket, prefix)
        if (now - found["Initiated"]).total_seconds() > older_than
    ]


def abort_upload(client: S3Client, bucket: str, upload: OldUpload) -> None:
    """End an upload, and remove its parts."""
    _abort(client, {"Bucket": bucket, "Key": upload.key, "UploadId": upload.upload_id})


def _upload_whole(
    client: S3Client, target: _Target, block: memoryview, condition: dict[str, str]
) -> None:
    checksum = _checksum(client, block)

    def send() -> None:
        answer = client.call_once(
            "put_object", **target, Body=_Body(block), **checksum, **condition
        )
        try:
            _confirm(answer, block, checksum)
        except ConnectionError:
            client.call("delete_object", **target)  # it was created by this very request
            raise

    try:
        retry(send, is_transient)
    except Exception as error:
        if http_status(error) not in (409, 412):
            raise
        # Nothing stood there a moment ago, and the name holds a write-id: a retry has found
        # what its first try, whose answer was lost, had written.
        if download(client, target, target["Key"], limit=None) != block:
            raise FileExistsError(target["Key"]) from error


def _upload_parts(
    client: S3Client,
    target: _Target,
    blocks: Iterator[memoryview],
    size: int,
    condition: dict[str, str],
) -> None:
    begun = 0

    def begin() -> Any:
        nonlocal begun
        begun += 1
        kind = {"ChecksumAlgorithm": "CRC32"} if client.sends_checksums else {}
        return client.call_once("create_multipart_upload", **target, **kind)

    try:
        this = {**target, "UploadId": retry(begin, is_transient)["UploadId"]}
        try:
            sent = _send_parts(client, this, blocks)
            _complete(client, this, sent, size, condition)
        except BaseException:
            with contextlib.suppress(Exception):  # the error under way says more
                _abort(client, this)
            raise
    finally:
        if begun > 1:
            # An answer was lost, and with it the name of an upload that may have been begun. It
            # holds no parts; `abort_uploads` finds it later if it cannot be removed now.
            with contextlib.suppress(Exception):
                _abort_all(client, target)


def _send_parts(client: S3Client, this: _Target, blocks: Iterator[memoryview]) -> list[_Part]:
    """Upload blocks, several at once, as they come."""
    under_way: set[Future[_Part]] = set()
    sent: list[_Part] = []
    with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="ckpt-tasks-upload") as pool:
        try:
            for number, block in enumerate(blocks, 1):
                if len(under_way) == CONNECTIONS:
                    done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                    sent.extend(part.result() for part in done)
                under_way.add(pool.submit(_send_part, client, this, number, block))
            sent.extend(part.result() for part in under_way)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return sorted(sent, key=lambda part: part["PartNumber"])


def _send_part(client: S3Client, this: _Target, number: int, block: memoryview) -> _Part:
    checksum = _checksum(client, block)

    def send() -> _Part:
        answer = client.call_once(
            "upload_part", **this, PartNumber=number, Body=_Body(block), **checksum
        )
        _confirm(answer, block, checksum)
        told = {name: answer[name] for name in ("ETag", *checksum) if name in answer}
        return {"PartNumber": number, **told}

    return retry(send, is_transient)


def _checksum(client: S3Client, block: memoryview) -> dict[str, str]:
    """As an argument of a request; none where the client is configured to send none."""
    if not client.sends_checksums:
        return {}
    return {"ChecksumCRC32": base64.b64encode(zlib.crc32(block).to_bytes(4, "big")).decode()}


def _confirm(answer: Any, block: memoryview, checksum: dict[str, str]) -> None:
    """Raise an error worth a further try where the server has got other bytes.

    Where it tells neither checksum nor MD5, only the size of the whole object is compared.
    """
    told = {name: answer[name] for name in checksum if name in answer}
    md5 = _MD5.fullmatch(answer.get("ETag", ""))
    if told:
        same = told == checksum
    elif md5 and not any(name in answer for name in _ENCRYPTION):
        same = md5[1] == hashlib.md5(block, usedforsecurity=False).hexdigest()
    else:
        same = True
    if not same:
        raise ConnectionError(f"{block.nbytes} bytes were changed on the way")


def _complete(
    client: S3Client, this: _Target, sent: list[_Part], size: int, condition: dict[str, str]
) -> None:
    try:
        client.call(
            "complete_multipart_upload", **this, MultipartUpload={"Parts": sent}, **condition
        )
    except Exception:
        # A completed upload is unknown to the retry that completes it again, after an answer
        # was lost. The name holds a write-id, so what stands there is ours.
        if _size(client, this) != size:
            raise


def _size(client: S3Client, target: _Target) -> int | None:
    try:
        answer = client.call("head_object", Bucket=target["Bucket"], Key=target["Key"])
    except FileNotFoundError:
        return None
    return int(answer["ContentLength"])


def _abort(client: S3Client, this: _Target) -> None:
    with contextlib.suppress(FileNotFoundError):  # the answer to an earlier try was lost
        client.call("abort_multipart_upload", **this)


def _abort_all(client: S3Client, target: _Target) -> None:
    for found, _ in list(_uploads_under_way(client, target["Bucket"], target["Key"])):
        if found["Key"] == target["Key"]:
            _abort(client, {**target, "UploadId": found["UploadId"]})


def _uploads_under_way(
    client: S3Client, bucket: str, prefix: str
) -> Iterator[tuple[dict[str, Any], datetime]]:
    """Each upload neither completed nor aborted, and what time it is at the server."""
    markers: dict[str, str] = {}
    while True:
        page = client.call(
            "list_multipart_uploads",
            Bucket=bucket,
            Prefix=prefix,
            MaxUploads=_LISTED_AT_ONCE,
            **markers,
        )
        now = _server_time(page)
        for found in page.get("Uploads", []):
            yield found, now
        following = {
            name: page[f"Next{name}"]
            for name in ("KeyMarker", "UploadIdMarker")
            if page.get(f"Next{name}")
        }
        if not page["IsTruncated"] or following in ({}, markers):
            return
        markers = following


def _server_time(answer: Any) -> datetime:
    told = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    if told is None:
        raise StoreError("the server does not say what time it is, so no upload's age is known")
    return parsedate_to_datetime(told)


class _Body(io.RawIOBase):
    """Memory as a file, without a copy of it but for its end.

    Reading it fails where a connection takes it too slowly, and after it was closed: then whoever
    still sends it has been given up, and the memory may be in use for something else. Nobody can
    take back the piece that is being sent, which is why the last one is a copy: without it, the
    server has no whole body, and drops what it got.
    """

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._position = 0
        self._progressed = time.monotonic()
        self._rate = LeastRate(CONNECTIONS)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._memory.nbytes}
        self._position = start[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int | None = -1) -> Any:
        if self.closed:
            raise ValueError("the request was given up")
        if self._position == 0:
            self._rate = LeastRate(CONNECTIONS)
        self._rate.check(self._position)
        self._progressed = time.monotonic()
        wanted = self._memory.nbytes if size is None or size < 0 else size
        piece = self._memory[self._position : self._position + wanted]
        self._position += piece.nbytes
        return piece if self._position < self._memory.nbytes else bytes(piece)

    def progressed(self) -> float:
        """When it was last read, by `time.monotonic`."""
        return self._progressed


def _blocks(parts: Iterable[Any], size: int, block_size: int) -> Iterator[memoryview]:
    """The `size` bytes of `parts` in blocks of `block_size`, the last one shorter.

    A block that lies in one part is that part's memory, not a copy.
    """
    joined = bytearray()
    seen = 0
    for part in parts:
        view = memoryview(part).cast("B")
        seen += view.nbytes
        if seen > size:  # before any of it is sent
            raise StoreError(f"{seen} bytes or more were given where {size} were announced")
        while view.nbytes:
            taken = view[: block_size - len(joined)]
            view = view[taken.nbytes :]
            if taken.nbytes == block_size:
                yield taken
                continue
            joined += taken
            if len(joined) == block_size:
                yield memoryview(joined)
                joined = bytearray()
    if seen != size:
        raise StoreError(f"{seen} bytes were given where {size} were announced")
    if joined:
        yield memoryview(joined)
