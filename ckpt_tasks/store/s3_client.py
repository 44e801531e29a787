"""Requests to S3 from many threads at once, over botocore's own connections.

s3fs sends all its requests from one thread, which hashes and copies each body on its way. That
thread is what bounds a transfer of many parts: botocore's client of the same requests, called
from threads, hashes and sends outside the interpreter's lock (``tests/benchmarks/s3_speed.py``).

Requests are retried by `ckpt_tasks.store.retry`, and not by botocore.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import Any

import botocore.config
import botocore.session
from botocore import UNSIGNED
from botocore.exceptions import ClientError, HTTPClientError, IncompleteReadError
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.handlers import add_expect_header
from botocore.loaders import Loader, create_loader
from botocore.parsers import ResponseParserError
from s3fs.errors import translate_boto_error
from urllib3.exceptions import HTTPError

from ckpt_tasks.store.deadline import seconds_for, within
from ckpt_tasks.store.retry import is_transient as may_pass
from ckpt_tasks.store.retry import retry

__all__ = ["CONNECTIONS", "TIMEOUTS", "S3Client", "error_code", "is_transient", "share_loader"]

CONNECTIONS = 16
"""Requests of one `S3Client` under way at once."""

TIMEOUTS = {"connect_timeout": 10.0, "read_timeout": 30.0}
"""In seconds; of one wait for the other side, not of a whole transfer."""

_COMPLETION = "complete_multipart_upload"
_COMPLETION_SECONDS = 600.0  # S3 sends white space while it is at it, which can take minutes

_CUT_OFF = (
    *(BotoConnectionError, HTTPClientError, IncompleteReadError, ResponseParserError),
    HTTPError,
)
# What answers of 400 say of a request that is right, and of one that was changed on its way.
_PASSING_CODES = {"RequestTimeout", "BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch"}


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed if it is sent again."""
    known = isinstance(error, _CUT_OFF) or error_code(error) in _PASSING_CODES
    return known or may_pass(error)


def error_code(error: BaseException | None) -> str:
    """What S3 calls the error behind an exception or one of its causes; empty if nothing."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return ""


def share_loader(session: botocore.session.Session) -> None:
    """Have a session know what S3's requests look like as soon as any in this process does, which
    takes a tenth of a second to read.
    """
    path = session.get_config_variable("data_path")
    session.register_component("data_loader", _loader(path))


@functools.cache
def _loader(data_path: str | None) -> Loader:
    return create_loader(data_path)


class S3Client:
    """Thread-safe; connects when it is first used.

    Parameters
    ----------
    filesystem
        The `s3fs.S3FileSystem` whose settings, and so whose credentials, it shares.
    """

    def __init__(self, filesystem: Any) -> None:
        self._fs = filesystem
        self._lock = threading.Lock()
        self._client: Any = None

    def call(self, method: str, **arguments: Any) -> Any:
        """Send one request, again where that may help; returns the answer.

        Raises
        ------
        OSError
            As s3fs does: `FileNotFoundError` and `PermissionError` are told apart.
        """
        return retry(lambda: self.call_once(method, **arguments), is_transient)

    def call_once(self, method: str, **arguments: Any) -> Any:
        """As `call`, without further tries.

        A `Body` is closed, so that no request that was given up reads on in its memory.
        """
        body = arguments.get("Body")
        with contextlib.nullcontext() if body is None else contextlib.closing(body):
            seconds = _COMPLETION_SECONDS if method == _COMPLETION else seconds_for(0, CONNECTIONS)
            return within(
                seconds,
                lambda: self._send(method, arguments),
                progressed=None if body is None else body.progressed,
            )

    def _send(self, method: str, arguments: dict[str, Any]) -> Any:
        try:
            return getattr(self._connected(), method)(**arguments, **self._fs.req_kw)
        except ClientError as error:
            raise translate_boto_error(error) from error

    @property
    def sends_checksums(self) -> bool:
        """Whether bodies carry a checksum: some servers refuse requests that do.

        For those, botocore's ``AWS_REQUEST_CHECKSUM_CALCULATION=when_required`` turns it off.
        """
        config = self._connected().meta.config
        return bool(config.request_checksum_calculation == "when_supported")

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    def _connected(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = self._connect()
            return self._client

    def _connect(self) -> Any:
        self._fs.connect()
        session = botocore.session.Session(**self._fs.kwargs)
        share_loader(session)
        settings = dict(
            self._fs.config_kwargs,
            max_pool_connections=CONNECTIONS,
            response_checksum_validation="when_required",  # who reads compares digests
        )
        if self._fs.anon:
            settings["signature_version"] = UNSIGNED
        client = session.create_client(
            "s3",
            config=botocore.config.Config(**settings),
            endpoint_url=self._fs.endpoint_url,
            use_ssl=self._fs.use_ssl,
            **self._fs.client_kwargs,
        )
        # Else each part would wait for one more answer: "100 Continue".
        client.meta.events.unregister("before-call.s3", add_expect_header)
        if client.meta.endpoint_url.startswith("https:"):
            # TLS and the checksum that we send protect a body; botocore leaves its signature out
            # as well where it computes that checksum itself.
            client.meta.config.s3 = {
                "payload_signing_enabled": False,
                **(client.meta.config.s3 or {}),
            }
        return client
