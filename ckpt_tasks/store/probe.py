"""Find out whether an object store honours the condition of a conditional create.

Some servers that speak S3 (gateways, emulators) ignore ``If-None-Match`` and overwrite, and say
so nowhere. On them two attempts would both believe that they own the run.
"""

from __future__ import annotations

import contextlib
import threading
import uuid

from ckpt_tasks.errors import ObjectExistsError, StoreError
from ckpt_tasks.store.ambiguity import create_once
from ckpt_tasks.store.base import Store

__all__ = ["honours_conditions"]

_FOLDER = ".ckpt_tasks"  # hidden, so never listed

_lock = threading.Lock()
_answers: dict[str, bool] = {}


def honours_conditions(store: Store, key: str) -> bool:
    """Whether a second create of one small object is refused by the server itself.

    Makes, and deletes again, one object below the store's root. The answer is kept for this
    process under `key`, which must tell apart all that decides which server is asked.

    Raises
    ------
    StoreError
        The store did not answer, or cannot be written.
    """
    with _lock:
        if key not in _answers:
            _answers[key] = _ask(store)
        return _answers[key]


def _ask(store: Store) -> bool:
    path = f"{_FOLDER}/probe-{uuid.uuid4().hex}"
    create_once(store, path, b"first")
    try:
        store.create(path, b"second")
    except ObjectExistsError:
        return True
    finally:
        with contextlib.suppress(StoreError):  # may be forbidden; the object is tiny and hidden
            store.delete(path)
    return False
