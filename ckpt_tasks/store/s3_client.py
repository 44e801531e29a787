"""Requests to S3 from many threads at once, over botocore's own connections.

s3fs sends all its requests from one thread, which hashes and copies each body on its way. That
thread is what bounds a transfer of many parts: botocore's client of the same requests, called
from threads, hashes and sends outside the interpreter's lock (``tests/benchmarks/s3_speed.py``).

Requests are retried here and not by botocore, which draws the delays between its retries from
`random`'s global generator, and so would change the training that saves. stamina draws its jitter
from there too, and has a switch that turns every retry of the process off.
"""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

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

from ckpt_tasks.store.object import http_status

__all__ = [
    "CONNECTIONS",
    "TIMEOUTS",
    "S3Client",
    "delays",
    "error_code",
    "is_transient",
    "retry",
    "share_loader",
]

CONNECTIONS = 16
"""Requests of one `S3Client` under way at once."""

TIMEOUTS = {"connect_timeout": 10.0, "read_timeout": 30.0}
"""In seconds; of one wait for the other side, not of a whole transfer."""

_DELAYS = (0.2, 0.8, 2.4, 5.0)  # seconds before each further try
_spread = random.Random()  # noqa: S311 - of its own, so that the training's is left alone
_CUT_OFF = (
    *(BotoConnectionError, HTTPClientError, IncompleteReadError, ResponseParserError),
    *(HTTPError, ConnectionError, TimeoutError),
)
# What answers of 400 say of a request that is right, and of one that was changed on its way.
_PASSING_CODES = {"RequestTimeout", "BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch"}
_NOT_IMPLEMENTED = 501

T = TypeVar("T")


def delays() -> Iterator[float]:
    """Seconds to wait before each further try of a request.

    Spread out, so that threads and ranks that were refused at once do not come again at once.
    """
    for delay in _DELAYS:
        yield delay * _spread.uniform(0.5, 1.5)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed if it is sent again."""
    if isinstance(error, _CUT_OFF):
        return True
    status = http_status(error)
    busy = status is not None and (status == 429 or 500 <= status != _NOT_IMPLEMENTED)
    return busy or error_code(error) in _PASSING_CODES


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


def retry(act: Callable[[], T]) -> T:
    """Call `act` until it succeeds or fails for good; raises its last error."""
    for delay in delays():
        try:
            return act()
        except Exception as error:
            if not is_transient(error):
                raise
        time.sleep(delay)
    return act()


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
        return retry(lambda: self.call_once(method, **arguments))

    def call_once(self, method: str, **arguments: Any) -> Any:
        """As `call`, without further tries."""
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
