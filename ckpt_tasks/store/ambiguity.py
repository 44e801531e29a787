"""Conditional creates whose answer may be lost."""

from __future__ import annotations

import time
from collections.abc import Callable

from ckpt_tasks.errors import (
    CorruptCheckpointError,
    NoSpaceError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreError,
)
from ckpt_tasks.store.base import Store

__all__ = ["create_once"]

_TRIES = 6
_FIRST_DELAY = 0.1  # seconds; doubled each time: 3.1 s in all, beside the tries' own deadlines


def create_once(
    store: Store, path: str, data: bytes, *, sleep: Callable[[float], None] = time.sleep
) -> bool:
    """Create an object, and find out whose it is when the store does not say.

    A time-out, a dropped connection or the client's own retry can hide a create that landed.
    The identical create is then repeated, which is safe because it is conditional; whoever finds
    an object at `path` reads it back and compares.

    Parameters
    ----------
    data
        Must hold an id unique to this call, so that equal bytes mean "ours".
    sleep
        Called with the seconds to wait between tries. The delays are fixed: nothing is drawn
        from a random generator, since the global ones belong to the training.

    Returns
    -------
    bool
        True if `data` stands at `path`; False if somebody else's object does.

    Raises
    ------
    StoreError
        The store never gave an answer that settles it. The object may or may not stand. A
        `NoSpaceError` where it had no room.
    """
    for attempt in range(1, _TRIES + 1):
        try:
            return _create_or_compare(store, path, data)
        except StoreError as error:
            if attempt == _TRIES:
                kind = NoSpaceError if isinstance(error, NoSpaceError) else StoreError
                raise kind(
                    f"whether {path} was created in {store.url} is not known after {_TRIES} "
                    f"tries: {error}"
                ) from error
        sleep(_FIRST_DELAY * 2 ** (attempt - 1))
    raise AssertionError("the last try returns or raises")


def _create_or_compare(store: Store, path: str, data: bytes) -> bool:
    try:
        store.create(path, data)
    except ObjectExistsError:
        return _is_ours(store, path, data)
    return True


def _is_ours(store: Store, path: str, data: bytes) -> bool:
    try:
        return store.read(path, limit=len(data)) == data
    except CorruptCheckpointError:  # longer than ours
        return False
    except ObjectNotFoundError as error:
        raise StoreError(f"{path} exists and cannot be read") from error
