"""What ranks say to one another goes through a store of torch.distributed, which any can reach."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec
from torch.distributed import (  # type: ignore[attr-defined]
    DistError,
    DistStoreError,
    TCPStore,
)

from ckpt_tasks.errors import StoreError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["RankMessages", "connect_ranks", "store_errors"]


def connect_ranks(host: str, port: int, *, serve: bool, seconds: float = 120.0) -> TCPStore:
    """The store that all ranks of an attempt talk through.

    Parameters
    ----------
    host, port
        Where one process serves it; with port 0, where there is room, and the store knows it. Where
        it is the ``MASTER_PORT`` of the user's own process group, rank 0 serves both, or
        torchrun's agent, which serves anybody.
    serve
        True in that process.
    seconds
        How long to wait for it to come up.

    Raises
    ------
    StoreError
        Nothing answers there, or the port is taken.
    """
    with store_errors():
        return TCPStore(
            host,
            port,
            is_master=serve,
            wait_for_workers=False,
            # The same process may serve a process group's messages there, too.
            multi_tenant=True,
            timeout=timedelta(seconds=seconds),
        )


class RankMessages:
    """Small messages under keys of a store of torch.distributed.

    Any method raises `StoreError` where the store cannot be reached any more.
    """

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = store
        self._prefix = prefix

    def clone(self) -> RankMessages:
        """On a connection of its own: one that waits holds back all others who use it."""
        store: Any = self._store
        with store_errors():
            return RankMessages(store.clone(), self._prefix)

    def count(self, key: str) -> int:
        """How often this was called by any rank."""
        with store_errors():
            return int(self._store.add(self._prefix + key, 1))

    def put(self, key: str, message: msgspec.Struct) -> None:
        self.put_bytes(key, msgspec.msgpack.encode(message))

    def put_bytes(self, key: str, message: bytes) -> None:
        with store_errors():
            self._store.set(self._prefix + key, message)  # type: ignore[arg-type]

    def get(self, key: str, kind: Any, *, seconds: float) -> Any:
        found = self.get_all([key], seconds=seconds)
        return None if found is None else msgspec.msgpack.decode(found[0], type=kind)

    def get_all(self, keys: list[str], *, seconds: float) -> list[bytes] | None:
        """Messages under all keys; ``None`` where one is not there in time."""
        full = [self._prefix + key for key in keys]
        with store_errors():
            try:
                self._store.wait(full, timedelta(seconds=seconds))
            except DistStoreError:
                return None
            return [bytes(data) for data in self._store.multi_get(full)]


@contextlib.contextmanager
def store_errors() -> Iterator[None]:
    try:
        yield
    except DistError as error:
        raise StoreError(f"the store of torch.distributed does not answer: {error}") from error
