"""Open a store by its URL."""

from __future__ import annotations

import os
import random
import re
import stat
import sys
from typing import Any

from ckpt_tasks.config import StoreConfig
from ckpt_tasks.errors import CkptTasksError, ConfigError, StoreError
from ckpt_tasks.masking import is_secret_name, mask_text, mask_url
from ckpt_tasks.store.base import Store
from ckpt_tasks.store.deadline import seconds_for, within
from ckpt_tasks.store.generic import FsspecStore
from ckpt_tasks.store.local import LocalStore
from ckpt_tasks.store.object import CONDITIONAL_PROTOCOLS, ObjectStore
from ckpt_tasks.store.probe import honours_conditions

__all__ = ["open_existing_store", "open_store", "shown_place"]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?(.*)", re.DOTALL)
_S3 = ("s3", "s3a")
_CREDENTIALS = {"key", "secret", "token", "username", "password", "connection_string", "sas_token"}
_PACKAGES = {
    "s3": "ckpt-tasks[s3]", "s3a": "ckpt-tasks[s3]", "gs": "gcsfs", "gcs": "gcsfs",
    "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs",
}  # fmt: skip
_spread = random.Random()  # noqa: S311 - of delays


def open_store(config: StoreConfig | str, *, for_writing: bool = False) -> Store:
    """Open the store that `config` names.

    Parameters
    ----------
    config
        A configuration, or just its URL: a path, ``file:``, ``memory:``, ``s3:``, or any other
        that fsspec opens. Relative paths are taken from the working directory.
    for_writing
        Also check that attempts may write here: that the place is writable, and that of two
        writers only one can win a create, unless it is declared single-writer. An object store
        is asked by writing a small object twice, once per process.

    Returns
    -------
    Store
        Its `url` opens the same store again in another process, given the same options, unless
        it held userinfo, which is masked.

    Raises
    ------
    ConfigError
        The URL, its options, the credentials or the place cannot be used as asked.
    StoreError
        Storage did not answer.
    """
    if isinstance(config, str):
        config = StoreConfig(url=config)
    store = _open(config)
    if for_writing:
        _check_writing(store, config)
    return store


def open_existing_store(config: StoreConfig, *, for_writing: bool = False) -> Store:
    """Open a store that is there, to look at what it holds or to change it; as `open_store`.

    Raises `ConfigError` where there is no such folder: a mistyped store must not look empty; and
    `StoreError` where that cannot be known, as on a network's file system that is away.
    """
    store = open_store(config)
    if isinstance(store, LocalStore) and not _is_folder(store.root):
        raise ConfigError(f"there is no store at {store.root}; correct --store or store.url")
    return open_store(config, for_writing=True) if for_writing else store


def _is_folder(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise StoreError(f"the store {path} does not answer: {error.strerror}") from error


def shown_place(url: str) -> str:
    """A store's URL for people, without opening it: absolute, userinfo masked."""
    if _URL.fullmatch(url):
        return mask_url(url)
    return os.path.abspath(os.path.expanduser(url))


def _open(config: StoreConfig) -> Store:
    if not config.url.strip():
        raise ConfigError("the store's url is empty; give a path or a URL such as s3://bucket/dir")
    if "::" in config.url and "://" in config.url:
        raise ConfigError(
            f"the store {mask_url(config.url)} chains file systems, whose caches hide other "
            "writers' objects; name the last one alone"
        )
    match = _URL.fullmatch(config.url)
    if match is None:
        return _open_local(config, config.url)
    protocol, slashes, rest = match[1].lower(), match[2], match[3]
    if protocol in ("file", "local"):
        return _open_local(config, _local_path(config.url, slashes, rest))
    if protocol == "memory":
        return _open_memory(config, rest)
    if slashes is None:
        import fsspec

        if protocol in fsspec.available_protocols():
            meant = mask_url(f"{protocol}://{rest}")
            raise ConfigError(f"the store's url lacks two slashes; write {meant}")
        return _open_local(config, config.url)
    return _open_remote(config, protocol, rest)


def _open_local(config: StoreConfig, path: str) -> LocalStore:
    _refuse_options(config)
    return LocalStore(os.path.abspath(os.path.expanduser(path)))


def _local_path(url: str, slashes: str | None, rest: str) -> str:
    if slashes and not rest.startswith(("/", "~")):
        shown = mask_url(url)
        place = shown.partition("://")[2]
        raise ConfigError(
            f"{shown} names a host, not a path; write file:///{place} or file:{place}"
        )
    if not rest:
        raise ConfigError(f"{mask_url(url)} names no path")
    return rest


def _open_memory(config: StoreConfig, rest: str) -> Store:
    from ckpt_tasks.store.memory import MemoryStore

    _refuse_options(config)
    if not rest.strip("/"):
        raise ConfigError("a store in memory needs a name, as in memory://name")
    return MemoryStore(rest)


def _refuse_options(config: StoreConfig) -> None:
    if config.options:
        raise ConfigError(
            f"the store {mask_url(config.url)} takes no options: {sorted(config.options)}"
        )


def _open_remote(config: StoreConfig, protocol: str, rest: str) -> Store:
    import fsspec  # only here: it takes a tenth of a second

    shown = mask_url(config.url)
    secret = [k for k in config.options if k.lower() in _CREDENTIALS or is_secret_name(k)]
    if secret:
        raise ConfigError(
            f"the options {sorted(secret)} of the store {shown} are credentials; those come from "
            "the environment or the cloud's own configuration files"
        )
    try:
        if protocol in _S3:
            return _open_s3(rest, config.options)
        # Some connect here, or look for credentials in a network.
        filesystem, root = within(
            seconds_for(0, connections=1),
            lambda: fsspec.url_to_fs(
                config.url, use_listings_cache=False, skip_instance_cache=True, **config.options
            ),
        )
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        hint = f"pip install '{package}'" if package else str(error)
        raise ConfigError(f"{shown} needs a package that is not installed: {hint}") from error
    except CkptTasksError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"cannot open the store {shown}: {mask_text(str(error))}") from error
    except Exception as error:  # of a client library that is not known here
        said = mask_text(f"{type(error).__name__}: {error}")
        raise StoreError(f"cannot open the store {shown}: {said}") from error
    _leave_generators_alone()
    kind = ObjectStore if protocol in CONDITIONAL_PROTOCOLS else FsspecStore
    return kind(filesystem, root, shown)


def _leave_generators_alone() -> None:
    """Keep gcsfs, which draws the delays between its tries, from those of the training."""
    if "gcsfs.retry" in sys.modules:
        vars(sys.modules["gcsfs.retry"])["random"] = _spread


def _open_s3(rest: str, options: dict[str, Any]) -> Store:
    from ckpt_tasks.store.s3 import S3Store

    bucket, _, prefix = rest.strip("/").partition("/")
    if not bucket or "@" in bucket:
        meant = mask_url(f"s3://{rest.strip('/')}")
        raise ConfigError(
            f"{meant} does not begin with a bucket; write s3://bucket/prefix, and leave "
            "credentials to the environment"
        )
    store = S3Store(bucket, prefix, options)
    store.check_reachable()
    return store


def _check_writing(store: Store, config: StoreConfig) -> None:
    if isinstance(store, LocalStore):
        store.check_writable()
    elif isinstance(store, ObjectStore):
        key = f"{config.url} {sorted(config.options.items())}"
        store.supports_conditional_create = honours_conditions(store, key)
    if not (store.supports_conditional_create or config.single_writer):
        raise ConfigError(
            f"the store {store.url} does not refuse to create what exists already, so two attempts "
            "could both commit; use another store, or declare that only one attempt can ever "
            "write: single_writer = true"
        )
