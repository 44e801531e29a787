"""Open a store by its URL."""

from __future__ import annotations

import os
import re

from ckpt_tasks.config import StoreConfig
from ckpt_tasks.errors import ConfigError
from ckpt_tasks.store.base import Store
from ckpt_tasks.store.local import LocalStore

__all__ = ["open_store"]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?(.*)", re.DOTALL)


def open_store(config: StoreConfig | str, *, for_writing: bool = False) -> Store:
    """Open the store that `config` names.

    Parameters
    ----------
    config
        A configuration, or just its URL: a path, ``file:``, ``memory:``, ``s3:``, or any other
        that fsspec opens.
    for_writing
        Also check that attempts may write here: that the place is writable, and that no two
        writers can both win a create, unless it is declared single-writer.

    Raises
    ------
    ConfigError
        The URL, its options or the place cannot be used as asked.
    StoreError
        Storage did not answer.
    """
    if isinstance(config, str):
        config = StoreConfig(url=config)
    store = _open(config)
    if for_writing:
        _check_writing(store, config)
    return store


def _open(config: StoreConfig) -> Store:
    if not config.url:
        raise ConfigError("the store's url is empty; give a path or a URL such as s3://bucket/dir")
    match = _URL.fullmatch(config.url)
    protocol = match[1].lower() if match else None
    if match is None or (match[2] is None and protocol not in ("file", "memory")):
        return _open_local(config, config.url)
    if protocol in ("file", "local"):
        return _open_local(config, match[3])
    if protocol == "memory":
        from ckpt_tasks.store.memory import MemoryStore

        return MemoryStore(match[3])
    raise ConfigError(f"no store opens {config.url}")


def _open_local(config: StoreConfig, path: str) -> LocalStore:
    if config.options:
        raise ConfigError(f"a store on a local path takes no options: {sorted(config.options)}")
    return LocalStore(os.path.abspath(os.path.expanduser(path)))


def _check_writing(store: Store, config: StoreConfig) -> None:
    if isinstance(store, LocalStore):
        store.check_writable()
    if not (store.supports_conditional_create or config.single_writer):
        raise ConfigError(
            f"{store.url} has no conditional create, so two attempts could both commit; use "
            "another store, or declare that only one attempt can ever write: single_writer = true"
        )
