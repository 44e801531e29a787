"""A checkpoint by its address, for those who use the model and do not train it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple, Self

import torch

from ckpt_tasks.checkpointer.lazy import LazyTensor, open_checkpoint
from ckpt_tasks.checkpointer.reader import LoadedCheckpoint, load_checkpoint
from ckpt_tasks.checkpointer.sharded_reader import ShardedCheckpoint, open_rank
from ckpt_tasks.config import StoreConfig
from ckpt_tasks.errors import ConfigError, CorruptCheckpointError
from ckpt_tasks.fencing.attempts import MAX_RECORD_BYTES
from ckpt_tasks.format.codec import decode
from ckpt_tasks.format.digest import digest as digest_of
from ckpt_tasks.format.layout import RunLayout, decode_name
from ckpt_tasks.format.records import CommitRecord
from ckpt_tasks.state.placing import place_all
from ckpt_tasks.state.restored import RestoredValues
from ckpt_tasks.state.tensors import tensor_from_buffer, values_from_image
from ckpt_tasks.store import Store, open_store
from ckpt_tasks.training.restore import restored_values

__all__ = ["OpenCheckpoint", "load_uri", "load_values", "open_uri"]


def load_uri(
    uri: str, names: Collection[str], *, digest: str | None = None, rank: int = 0
) -> RestoredValues:
    """The saved values of some tracked names, every byte verified.

    Parameters
    ----------
    uri
        Of the commit record, as registries, events and `locate` tell it.
    names
        Tracked names: ``["model"]``. The value of a module is its state dict.
    digest
        Of the record's bytes, as told beside the uri; checked when given.
    rank
        Whose values they are, where several ranks saved. Sharded tensors are whole whoever's they
        are, and what ranks hold alike is the same; random generators, the place in the data and
        buffers that are not synchronised belong to each alone.

    Raises
    ------
    ConfigError
        The uri names no commit record, or there is no such rank.
    ObjectNotFoundError
        The checkpoint is no longer there.
    CorruptCheckpointError
        The bytes are not those that were committed, or one of the names is not among them.
    StoreError
        Storage did not answer.
    """
    where = _place(uri)
    with open_store(StoreConfig(url=where.root)) as store:
        record = _read_record(store, where, uri, digest)
        return load_values(store, where.layout, record, names, rank=rank)


def load_values(
    store: Store,
    layout: RunLayout,
    record: CommitRecord,
    names: Collection[str],
    *,
    rank: int = 0,
    keep_device: bool = True,
) -> RestoredValues:
    """As `load_uri`, of a record that has been read.

    Parameters
    ----------
    keep_device
        Whether tensors of others than modules come back on the device where they were.
    """
    if (record.world_size, rank) == (1, 0):
        loaded = load_checkpoint(store, layout, record, names=names)
        return _whole(loaded, names, keep_device=keep_device)
    opened = open_rank(store, layout, record, rank)
    opened.preload(names)
    return _whole(opened, names, keep_device=keep_device)


def open_uri(uri: str, *, digest: str | None = None, rank: int = 0) -> OpenCheckpoint:
    """A checkpoint to look into: only what is asked for is read, and verified before it is given.

    ::

        with open_uri(uri) as checkpoint:
            checkpoint["model"]["layer.weight"].norm()
            checkpoint.stored["optimizer"]["state.0.exp_avg"].shape      # reads nothing

    Parameters
    ----------
    uri, digest, rank
        As of `load_uri`.

    Raises as `load_uri`; looking at a damaged tensor raises `CorruptCheckpointError`.
    """
    where = _place(uri)
    store = open_store(StoreConfig(url=where.root))
    try:
        record = _read_record(store, where, uri, digest)
        found = open_checkpoint(store, where.layout, record, rank=rank)
        return OpenCheckpoint(store, record, found)
    except BaseException:
        store.close()
        raise


def _whole(
    start: LoadedCheckpoint | ShardedCheckpoint, names: Collection[str], *, keep_device: bool
) -> RestoredValues:
    """Values with every tensor whole, whichever parts ranks saved of it."""
    values = restored_values(start, names, only=names, keep_device=keep_device)
    values.update(place_all({n: (None, value) for n, value in values.items()}, values))
    return values


class OpenCheckpoint(Mapping[str, Mapping[str, torch.Tensor]]):
    """Tracked name to the tensors saved under it, by the keys that lead to each.

    The tensors are on the CPU. Of a store on this machine they are mapped from its files: they
    take no memory until they are looked at, and changing one changes no file. A tensor that several
    ranks saved parts of is put together from these at each look. Use it in a
    ``with`` block, or close it; tensors that were mapped or read stay usable after that.

    Attributes
    ----------
    record
        The commit record: position, metrics, hyperparameters.
    stored
        The same names and keys, with dtype, shape and size of each tensor, and its raw bytes.
    """

    def __init__(
        self,
        store: Store,
        record: CommitRecord,
        stored: Mapping[str, Mapping[str, LazyTensor]],
    ) -> None:
        self.record = record
        self.stored = stored
        self._store = store

    def __getitem__(self, name: str) -> Mapping[str, torch.Tensor]:
        return _Tensors(self.stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def __repr__(self) -> str:
        return f"OpenCheckpoint({self.record.id}, {sorted(self.stored)})"

    def close(self) -> None:
        """Release the connection to the store."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Tensors(Mapping[str, torch.Tensor]):
    def __init__(self, stored: Mapping[str, LazyTensor]) -> None:
        self._stored = stored

    def __getitem__(self, key: str) -> torch.Tensor:
        lazy = self._stored[key]
        details = {name: value for name, value in lazy.details.items() if name != "device"}
        try:
            image = tensor_from_buffer(lazy.read_private(), lazy.dtype, lazy.shape)
            return values_from_image(image, details)
        except ValueError as error:
            raise CorruptCheckpointError(f"{key}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __repr__(self) -> str:
        return repr(dict(self._stored))


class _Place(NamedTuple):
    """Root of the store, the run's layout, and the record's path from the root."""

    root: str
    layout: RunLayout
    path: str


def _read_record(store: Store, place: _Place, uri: str, digest: str | None) -> CommitRecord:
    data = store.read(place.path, limit=MAX_RECORD_BYTES)
    if digest is not None and digest_of(data) != digest:
        raise CorruptCheckpointError(
            f"{uri} is not what was told: its digest is {digest_of(data)}, not {digest}"
        )
    return decode(data, CommitRecord, path=place.path)


def _place(uri: str) -> _Place:
    parts = uri.rsplit("/", 3)
    path = "/".join(parts[1:])
    try:
        layout = RunLayout(decode_name(parts[1]))
        found = layout.checkpoint_id(path)
    except (IndexError, ValueError):
        found = None
    if found is None:
        raise ConfigError(
            f"{uri} names no checkpoint; it ends with RUN/commits/CHECKPOINT.json, as `ckpt-tasks "
            "show` and events tell it"
        )
    return _Place(parts[0], layout, path)
