"""S3 and what speaks its language. Needs the extra ``s3``.

Listings and small objects go through s3fs; what is in data objects, through `S3Client`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import s3fs
from aiobotocore.session import AioSession
from botocore.exceptions import (
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
)
from fsspec.asyn import sync_wrapper

from ckpt_tasks.errors import CkptTasksError, ConfigError, StoreError
from ckpt_tasks.masking import mask_url
from ckpt_tasks.store.base import UploadInfo
from ckpt_tasks.store.deadline import NoAnswerError, seconds_for
from ckpt_tasks.store.filesystem import BoundedFileSystem, DirectFileSystem
from ckpt_tasks.store.object import ObjectStore
from ckpt_tasks.store.retry import delays
from ckpt_tasks.store.s3_client import TIMEOUTS, S3Client, is_transient, share_loader
from ckpt_tasks.store.s3_download import download, download_range
from ckpt_tasks.store.s3_upload import OldUpload, abort_upload, old_uploads, upload

__all__ = ["S3Store"]

_NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)


class _RetryingFileSystem(s3fs.S3FileSystem):  # type: ignore[misc]
    """Gives each request a deadline, and a few further tries with delays of our own."""

    session: Any
    retries = 1  # s3fs's own

    async def set_session(self, refresh: bool = False, kwargs: dict[str, Any] | None = None) -> Any:
        if self.session is None:
            session = AioSession(**self.kwargs)
            share_loader(session)
            self.session = session
        return await super().set_session(refresh, kwargs or {})

    # s3fs's own are bound to its own `set_session`.
    _connect = set_session
    connect = sync_wrapper(set_session)

    async def _call_s3(self, method: str, *akwarglist: Any, **kwargs: Any) -> Any:
        for delay in delays():
            try:
                return await self._call_once(method, *akwarglist, **kwargs)
            except Exception as error:
                if not is_transient(error):
                    raise
            await asyncio.sleep(delay)
        return await self._call_once(method, *akwarglist, **kwargs)

    async def _call_once(self, method: str, *akwarglist: Any, **kwargs: Any) -> Any:
        seconds = seconds_for(len(kwargs.get("Body", b"")), connections=1)
        try:
            call = super()._call_s3(method, *akwarglist, **kwargs)
            return await asyncio.wait_for(call, seconds)
        except TimeoutError as error:
            raise NoAnswerError(seconds) from error

    call_s3 = sync_wrapper(_call_s3)  # s3fs's own is bound to its own `_call_s3`


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
                **TIMEOUTS,
                "retries": {"total_max_attempts": 1},
            },
            **{k: v for k, v in options.items() if k not in client},
        )
        root = f"{bucket}/{prefix}".rstrip("/")
        super().__init__(filesystem, root, mask_url(f"s3://{root}"))
        self._fs = filesystem
        self._bucket = bucket
        self._client = S3Client(filesystem)

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

    def read(self, path: str, *, limit: int | None = None) -> bytes:
        full = self._full(path)
        with self._errors("read", path):
            return download(self._client, self._target(full), self._shown(path), limit)

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        full = self._full(path)
        with self._errors("read", path):
            return bytes(
                download_range(self._client, self._target(full), self._shown(path), start, stop)
            )

    def read_into(self, path: str, start: int, stop: int, buffer: memoryview) -> None:
        full = self._full(path)
        with self._errors("read", path):
            target, shown = self._target(full), self._shown(path)
            download_range(self._client, target, shown, start, stop, buffer.cast("B"))

    def write(self, path: str, parts: Iterable[Any], size: int) -> None:
        full = self._full(path)
        with self._errors("write", path):
            if self._stands(full):
                raise FileExistsError(full)
            upload(self._client, self._target(full), parts, size)
            self._confirm_size(path, size)

    def replace(self, path: str, parts: Iterable[Any], size: int) -> None:
        with self._errors("write", path):
            upload(self._client, self._target(self._full(path)), parts, size, replaces=True)
            self._confirm_size(path, size)

    def list_uploads(self, prefix: str, older_than: float) -> list[UploadInfo]:
        with self._errors("list uploads below", prefix):
            bucket, below = self._below(prefix)
            return self._told(old_uploads(self._client, bucket, below, older_than))

    def abort_uploads(
        self,
        prefix: str,
        older_than: float,
        *,
        chosen: Callable[[str], bool] = lambda path: True,
    ) -> list[UploadInfo]:
        with self._errors("abort uploads below", prefix):
            (bucket, below), (_, root) = self._below(prefix), self._below("")
            old = old_uploads(self._client, bucket, below, older_than)
            aborted = [one for one in old if chosen(one.key.removeprefix(root))]
            for upload in aborted:
                abort_upload(self._client, bucket, upload)
            return self._told(aborted)

    def _told(self, uploads: Iterable[OldUpload]) -> list[UploadInfo]:
        _, root = self._below("")
        return sorted(UploadInfo(u.key.removeprefix(root), u.begun.timestamp()) for u in uploads)

    def close(self) -> None:
        self._client.close()
        if self._fs._s3 is not None:
            self._fs.close_session(self._fs.loop, self._fs._s3)

    def _bounded(self, filesystem: Any) -> BoundedFileSystem:
        return DirectFileSystem(filesystem)  # each of its requests ends

    def _target(self, full: str) -> dict[str, Any]:
        bucket, key, _ = self._fs.split_path(full)
        return {"Bucket": bucket, "Key": key}

    def _file_size(self, full: str) -> int:
        # One request; s3fs's `info` also lists when there is no such object.
        return int(self._fs.call_s3("head_object", **self._target(full))["ContentLength"])

    def _holds_object(self, prefix: str) -> bool:
        bucket, below = self._below(prefix)
        found = self._fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=below, MaxKeys=1)
        return bool(found["KeyCount"])

    def _below(self, prefix: str) -> tuple[str, str]:
        """The bucket, and what the keys of all objects below `prefix` begin with."""
        bucket, key, _ = self._fs.split_path(self._folder(prefix))
        return bucket, f"{key}/" if key else ""

    def _endpoint(self) -> str:
        return f" at {mask_url(self._fs.endpoint_url)}" if self._fs.endpoint_url else ""

    def _failure(self, verb: str, path: str, error: Exception) -> CkptTasksError:
        if isinstance(error, _NO_CREDENTIALS):
            # What has once been reached may give new ones, as an instance's role does.
            kind = ConfigError if verb == "reach" else StoreError
            return kind(
                f"no credentials for {self.url}: {error}. Set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, in the environment"
            )
        return super()._failure(verb, path, error)
