"""A checkpoint by its address, for those who use the model and do not train it."""

from __future__ import annotations

from collections.abc import Collection

from ckpt_tasks.checkpointer.reader import LoadedCheckpoint, load_checkpoint
from ckpt_tasks.checkpointer.sharded_reader import ShardedCheckpoint, open_sharded
from ckpt_tasks.config import StoreConfig
from ckpt_tasks.errors import ConfigError, CorruptCheckpointError
from ckpt_tasks.fencing.attempts import MAX_RECORD_BYTES
from ckpt_tasks.format.codec import decode
from ckpt_tasks.format.digest import digest as digest_of
from ckpt_tasks.format.layout import RunLayout, decode_name
from ckpt_tasks.format.records import CommitRecord
from ckpt_tasks.state.capture import RestoredValues
from ckpt_tasks.state.resharding import place
from ckpt_tasks.store import open_store
from ckpt_tasks.training.restore import restored_values

__all__ = ["load_uri"]


def load_uri(uri: str, names: Collection[str], *, digest: str | None = None) -> RestoredValues:
    """The saved values of some tracked names, every byte verified.

    Parameters
    ----------
    uri
        Of the commit record, as registries, events and `locate` tell it.
    names
        Tracked names: ``["model"]``. The value of a module is its state dict.
    digest
        Of the record's bytes, as told beside the uri; checked when given.

    Raises
    ------
    ConfigError
        The uri names no commit record.
    ObjectNotFoundError
        The checkpoint is no longer there.
    CorruptCheckpointError
        The bytes are not those that were committed, or one of the names is not among them.
    StoreError
        Storage did not answer.
    """
    root, run, path = _split(uri)
    store = open_store(StoreConfig(url=root))
    try:
        layout = RunLayout(run)
        data = store.read(path, limit=MAX_RECORD_BYTES)
        if digest is not None and digest_of(data) != digest:
            raise CorruptCheckpointError(
                f"{uri} is not what was told: its digest is {digest_of(data)}, not {digest}"
            )
        record = decode(data, CommitRecord, path=path)
        if record.world_size == 1:
            return _whole(load_checkpoint(store, layout, record, names=names), names)
        opened = open_sharded(store, layout, record)
        opened.preload(names)
        return _whole(opened, names)
    finally:
        store.close()


def _whole(start: LoadedCheckpoint | ShardedCheckpoint, names: Collection[str]) -> RestoredValues:
    """Values with every tensor whole, whichever parts ranks saved of it."""
    values = restored_values(start, names, only=names)
    for name, value in values.items():
        values[name] = place(name, None, value, values.keep)
    return values


def _split(uri: str) -> tuple[str, str, str]:
    """Root of the store, name of the run, and path of the record from the root."""
    parts = uri.rsplit("/", 3)
    path = "/".join(parts[1:])
    try:
        run = decode_name(parts[1])
        found = RunLayout(run).checkpoint_id(path)
    except (IndexError, ValueError):
        found = None
    if found is None:
        raise ConfigError(
            f"{uri} names no checkpoint; it ends with RUN/commits/CHECKPOINT.json, as `ckpt-tasks "
            "show` and events tell it"
        )
    return parts[0], run, path
