"""Which failures are tried again, and for how long."""

from __future__ import annotations

import importlib

import aiohttp
import fsspec.exceptions
import pytest
import requests

from ckpt_tasks.store import retry
from ckpt_tasks.store.deadline import NoAnswerError
from ckpt_tasks.store.retry import http_status, is_transient


class AnsweredError(Exception):
    """As clients raise for an answer: `gcsfs` has ``code``, aiohttp ``status``."""

    def __init__(self, **told: int) -> None:
        super().__init__("answered")
        vars(self).update(told)


@pytest.mark.parametrize(
    "error",
    [
        AnsweredError(code=503),
        AnsweredError(status=429),
        AnsweredError(status_code=500),
        ConnectionResetError(),
        EOFError(),
        NoAnswerError(1.0),
        TimeoutError(),
        fsspec.exceptions.FSTimeoutError(),
        aiohttp.ServerDisconnectedError(),
        aiohttp.ClientPayloadError(),
        requests.exceptions.ProxyError(),
    ],
)
def test_passing(error: Exception) -> None:
    """Broken connections, time-outs and busy servers, also behind another error."""
    assert is_transient(error)
    wrapped = RuntimeError("failed")
    wrapped.__cause__ = error
    assert is_transient(wrapped)


@pytest.mark.parametrize(
    "error",
    [
        *(AnsweredError(code=code) for code in (400, 403, 404, 412, 501)),
        *(FileNotFoundError(), PermissionError(), ValueError(), KeyboardInterrupt()),
    ],
)
def test_lasting(error: BaseException) -> None:
    """What will be refused again, and what is no failure of storage at all."""
    assert not is_transient(error)


def test_names_are_those_of_classes() -> None:
    """The classes that are known by name are there, in as far as their packages are."""
    found = set()
    for name in retry._CUT_OFF_NAMES:
        module, _, kind = name.rpartition(".")
        try:
            there = importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        assert issubclass(getattr(there, kind), Exception)
        found.add(module.partition(".")[0])
    assert found >= {"aiohttp", "requests", "urllib3"}


def test_answer_behind_an_error() -> None:
    """The status is found in the causes too; without an answer there is none."""
    outer = OSError("outer")
    outer.__cause__ = AnsweredError(status_code=412)
    assert http_status(outer) == 412
    assert http_status(ConnectionError()) is None


def test_no_further_try_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries end when there are no more delays, or no more seconds; the last error is raised."""
    monkeypatch.setattr(retry, "_DELAYS", (0.001,) * 3)
    tries = []

    def act() -> None:
        tries.append(len(tries))
        raise ConnectionError(f"try {len(tries)}")

    with pytest.raises(ConnectionError, match="try 4"):
        retry.retry(act, is_transient)
    tries.clear()
    with pytest.raises(ConnectionError, match="try 1"):
        retry.retry(act, is_transient, seconds=0.0)
