"""Which failures of storage pass, and further tries of what met one.

Requests are retried here and not by the client libraries, where those let themselves be told so:
several of them (botocore, gcsfs) draw the delays between their tries from `random`'s global
generator, and so would change the training that saves. stamina draws its jitter from there too,
and has a switch that turns every retry of the process off.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ckpt_tasks.store.deadline import NoAnswerError, TooSlowError

__all__ = ["delays", "http_status", "is_transient", "retry"]

_DELAYS = (0.2, 0.8, 2.4, 5.0)  # seconds before each further try
_spread = random.Random()  # noqa: S311 - of its own, so that the training's is left alone

_NOT_IMPLEMENTED = 501
_STATUS_NAMES = ("status", "status_code", "code")  # of aiohttp, azure.core, gcsfs
# paramiko and ftplib raise EOFError.
_CUT_OFF = (ConnectionError, EOFError, NoAnswerError, TimeoutError, TooSlowError)
# Of client libraries, which need not be installed. Their subclasses are meant as well.
_CUT_OFF_NAMES = {
    "aiohttp.client_exceptions.ClientConnectionError",
    "aiohttp.client_exceptions.ClientPayloadError",
    "azure.core.exceptions.IncompleteReadError",
    "azure.core.exceptions.ServiceRequestError",
    "azure.core.exceptions.ServiceResponseError",
    "paramiko.ssh_exception.NoValidConnectionsError",
    "requests.exceptions.ChunkedEncodingError",
    "requests.exceptions.ConnectionError",
    "requests.exceptions.Timeout",
    "urllib3.exceptions.HTTPError",
}

T = TypeVar("T")


def delays() -> Iterator[float]:
    """Seconds to wait before each further try of a request.

    Spread out, so that threads and ranks that were refused at once do not come again at once.
    """
    for delay in _DELAYS:
        yield delay * _spread.uniform(0.5, 1.5)


def retry(
    act: Callable[[], T], is_transient: Callable[[Exception], bool], *, seconds: float = math.inf
) -> T:
    """Call `act` until it succeeds or fails for good; raises its last error.

    Parameters
    ----------
    is_transient
        Whether an error of `act` is worth a further try.
    seconds
        After so many no further try begins.
    """
    end = time.monotonic() + seconds
    for delay in delays():
        try:
            return act()
        except Exception as error:
            if not is_transient(error) or time.monotonic() + delay > end:
                raise
        time.sleep(delay)
    return act()


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed if it is sent again, whatever client has sent it.

    Looks at the error, what it was raised from, and the server's answer behind them.
    """
    status = http_status(error)
    if status is not None:
        return status in (408, 429) or 500 <= status != _NOT_IMPLEMENTED
    return any(isinstance(cause, _CUT_OFF) or _is_named(cause) for cause in _causes(error))


def http_status(error: BaseException | None) -> int | None:
    """The status of the HTTP response behind an error or one of its causes, if there was one."""
    for cause in _causes(error):
        response: Any = getattr(cause, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            told = (getattr(cause, name, None) for name in _STATUS_NAMES)
            status = next((value for value in told if value), None)
        if isinstance(status, int):
            return status
    return None


def _is_named(error: BaseException) -> bool:
    kinds = type(error).__mro__
    return any(f"{kind.__module__}.{kind.__qualname__}" in _CUT_OFF_NAMES for kind in kinds)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
