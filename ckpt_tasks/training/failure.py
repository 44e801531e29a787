"""What an attempt ended with, in words that are the same when it happens again."""

from __future__ import annotations

import re
import signal

from ckpt_tasks.errors import StoreError
from ckpt_tasks.format.records import Failure
from ckpt_tasks.masking import mask_text
from ckpt_tasks.types import EXIT_FAILED, Position

__all__ = ["death_failure", "exception_failure", "message_of", "signal_name"]

_MAX_KIND = 300
_MAX_MESSAGE = 4000
_NUMBER = re.compile(r"0x[0-9a-fA-F]+|\d+")


def message_of(error: Exception) -> str:
    """An exception's words on one line, masked, not too long, and always writable as UTF-8."""
    text = str(error).encode("utf-8", "backslashreplace").decode()
    text = mask_text(" ".join(text.split()))
    if len(text) > _MAX_MESSAGE:
        return f"{text[:_MAX_MESSAGE]}... [{len(text) - _MAX_MESSAGE} more characters]"
    return text


def exception_failure(error: Exception, position: Position | None) -> Failure | None:
    """What an exception out of a training at `position` is remembered as.

    ``None`` where it says nothing of the training: before there was one, where storage failed,
    and for errors that no retry mends.
    """
    if position is None or isinstance(error, StoreError):
        return None
    if getattr(error, "exit_code", EXIT_FAILED) != EXIT_FAILED:
        return None
    # Addresses, process ids and free bytes differ each time.
    message = _NUMBER.sub("#", message_of(error))
    kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    return Failure(kind=f"{kind}: {message}"[:_MAX_KIND], step=position.step)


def death_failure(returncode: int, position: Position | None) -> Failure | None:
    """What a trainer that died at `position` is remembered as.

    Parameters
    ----------
    returncode
        As `subprocess.Popen.returncode`: negative for a signal.
    """
    if position is None:
        return None
    kind = signal_name(-returncode) if returncode < 0 else f"exit code {returncode}"
    return Failure(kind=kind, step=position.step)


def signal_name(number: int) -> str:
    """``SIGKILL``; real-time signals have no names."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
