"""S3 and what speaks its language, through s3fs. Needs the extra ``s3``.

Requests are retried here and not by botocore, which draws the delays between its retries from
`random`'s global generator, and so would change the training that saves.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import s3fs
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.exceptions import (
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
)
from fsspec.asyn import sync_wrapper

from ckpt_tasks.errors import CkptTasksError, ConfigError, StoreError
from ckpt_tasks.masking import mask_url
from ckpt_tasks.store.object import ObjectStore, http_status

__all__ = ["S3Store"]

_DELAYS = (0.2, 0.8, 2.4)  # seconds before each further try of a request
_CONNECT_TIMEOUT = 10.0
_READ_TIMEOUT = 30.0
_PART_BYTES = 16 * 1024 * 1024
_MAX_PARTS = 10_000
_UPLOADS = 8  # parts under way at once: at most 128 MiB of copies
_NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)


class _RetryingFileSystem(s3fs.S3FileSystem):  # type: ignore[misc]
    """Retries each request a few times, with delays that no random generator makes."""

    retries = 1  # s3fs's own

    async def _call_s3(self, method: str, *akwarglist: Any, **kwargs: Any) -> Any:
        for delay in _DELAYS:
            try:
                return await super()._call_s3(method, *akwarglist, **kwargs)
            except Exception as error:
                if not _is_transient(error):
                    raise
            await asyncio.sleep(delay)
        return await super()._call_s3(method, *akwarglist, **kwargs)

    call_s3 = sync_wrapper(_call_s3)  # s3fs's own is bound to its own `_call_s3`


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, (BotoConnectionError, HTTPClientError, TimeoutError)):
        return True
    status = http_status(error)
    return status is not None and (status >= 500 or status == 429)


class S3Store(ObjectStore):
    """Objects of an S3 bucket, below a prefix.

    Not usable in a forked child of the process that opened it: s3fs runs a thread.

    Parameters
    ----------
    bucket, prefix
        Where the store's root lies.
    options
        For `s3fs.S3FileSystem`, such as ``endpoint_url``; ``region_name`` as well.
    """

    def __init__(self, bucket: str, prefix: str, options: dict[str, Any]) -> None:
        client = {k: options[k] for k in ("region_name",) if k in options}
        filesystem = _RetryingFileSystem(
            skip_instance_cache=True,
            use_listings_cache=False,
            client_kwargs=client,
            config_kwargs={
                "connect_timeout": _CONNECT_TIMEOUT,
                "read_timeout": _READ_TIMEOUT,
                "retries": {"total_max_attempts": 1},
            },
            **{k: v for k, v in options.items() if k not in client},
        )
        root = f"{bucket}/{prefix}".rstrip("/")
        super().__init__(filesystem, root, mask_url(f"s3://{root}"))
        self._bucket = bucket

    def check_reachable(self) -> None:
        """Ask for the bucket once, so that what is wrong is said early and in plain words.

        For the store's own prefix, as some accounts may list nothing else of the bucket.
        """
        try:
            self._holds_object("")
        except FileNotFoundError as error:
            raise ConfigError(
                f"there is no bucket {self._bucket!r}{self._endpoint()}; make it, or correct the "
                f"store's url {self.url}"
            ) from error
        except PermissionError as error:
            raise ConfigError(
                f"access to {self.url}{self._endpoint()} is denied: {error}; check the credentials "
                "and that they may list, read and write this bucket"
            ) from error
        except TypeError as error:  # of a constructor that does not know an option
            raise ConfigError(f"an option of the store {self.url} is wrong: {error}") from error
        except Exception as error:
            raise self._failure("reach", "", error) from error

    def write(self, path: str, parts: Iterable[Any], size: int) -> None:
        full = self._full(path)
        with self._errors("write", path):
            if self._stands(full):
                raise FileExistsError(full)
            blocks = _blocks(parts, size, max(_PART_BYTES, -(-size // _MAX_PARTS)))
            if size <= _PART_BYTES:
                self._upload_whole(full, b"".join(blocks))
            else:
                self._upload_parts(full, blocks, size)
            self._confirm_size(path, size)

    def close(self) -> None:
        if self._fs._s3 is not None:
            self._fs.close_session(self._fs.loop, self._fs._s3)

    def _upload_whole(self, full: str, data: bytes) -> None:
        try:
            self._pipe_exclusively(full, data)
        except FileExistsError:
            # Nothing stood there a moment ago, and the name holds a write-id: a retry has found
            # what its first try, whose answer was lost, had written.
            if self._fs.cat_file(full) != data:
                raise

    def _upload_parts(self, full: str, blocks: Iterable[bytes], size: int) -> None:
        bucket, key, _ = self._fs.split_path(full)
        target = {"Bucket": bucket, "Key": key}
        target["UploadId"] = self._fs.call_s3("create_multipart_upload", **target)["UploadId"]
        try:
            tags = self._send(target, blocks)
            try:
                self._fs.call_s3(
                    "complete_multipart_upload",
                    **target,
                    MultipartUpload={
                        "Parts": [{"PartNumber": n, "ETag": tag} for n, tag in enumerate(tags, 1)]
                    },
                    IfNoneMatch="*",
                )
            except Exception:
                # As above: a completed upload is unknown to the retry that completes it again.
                if not self._stands(full) or self._file_size(full) != size:
                    raise
        except BaseException:
            with contextlib.suppress(Exception):  # the error under way says more
                self._fs.call_s3("abort_multipart_upload", **target)
            raise

    def _send(self, target: dict[str, str], blocks: Iterable[bytes]) -> list[str]:
        """Upload blocks, several at once, as they come. Returns their tags in order."""
        tags: list[Future[str]] = []
        with ThreadPoolExecutor(_UPLOADS, thread_name_prefix="ckpt-tasks-upload") as pool:
            for number, block in enumerate(blocks, 1):
                if number > _UPLOADS:
                    tags[number - _UPLOADS - 1].result()
                tags.append(pool.submit(self._send_part, target, number, block))
            return [tag.result() for tag in tags]

    def _send_part(self, target: dict[str, str], number: int, block: bytes) -> str:
        answer = self._fs.call_s3("upload_part", **target, PartNumber=number, Body=block)
        return str(answer["ETag"])

    def _file_size(self, full: str) -> int:
        # One request; s3fs's `info` also lists when there is no such object.
        bucket, key, _ = self._fs.split_path(full)
        return int(self._fs.call_s3("head_object", Bucket=bucket, Key=key)["ContentLength"])

    def _holds_object(self, prefix: str) -> bool:
        bucket, key, _ = self._fs.split_path(self._folder(prefix))
        below = f"{key}/" if key else ""
        found = self._fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=below, MaxKeys=1)
        return bool(found["KeyCount"])

    def _endpoint(self) -> str:
        return f" at {mask_url(self._fs.endpoint_url)}" if self._fs.endpoint_url else ""

    def _failure(self, verb: str, path: str, error: Exception) -> CkptTasksError:
        if isinstance(error, _NO_CREDENTIALS):
            return ConfigError(
                f"no credentials for {self.url}: {error}. Set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, in the environment"
            )
        return super()._failure(verb, path, error)


def _blocks(parts: Iterable[Any], size: int, block_size: int) -> Iterator[bytes]:
    """The `size` bytes of `parts`, cut into blocks of `block_size`, the last one shorter."""
    block = bytearray()
    seen = 0
    for part in parts:
        view = memoryview(part).cast("B")
        seen += view.nbytes
        while view.nbytes:
            taken = view[: block_size - len(block)]
            block += taken
            view = view[taken.nbytes :]
            if len(block) == block_size:
                yield bytes(block)
                block = bytearray()
    if seen != size:
        raise StoreError(f"{seen} bytes were given where {size} were announced")
    if block:
        yield bytes(block)
