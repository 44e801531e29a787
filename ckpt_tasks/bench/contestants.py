"""Saves and loads of one state: this package's, and those of others where they are installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ckpt_tasks.bench.measure import Contestant
from ckpt_tasks.checkpointer.checkpointer import Checkpointer, SaveRequest
from ckpt_tasks.checkpointer.drain import InlineDrain
from ckpt_tasks.checkpointer.job import JobRunner
from ckpt_tasks.checkpointer.reader import load_checkpoint
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.fencing.lineage import extend_lineage
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord, RunRecord, now
from ckpt_tasks.state.capture import capture, restore_values
from ckpt_tasks.state.tensors import tensor_from_buffer
from ckpt_tasks.store.base import Store
from ckpt_tasks.types import Position, SaveDecision

__all__ = ["OURS", "Ours", "peers"]

OURS = "ckpt-tasks"

_RUN = "ckpt-tasks-bench"


class Ours:
    """Saves and loads as a training does: capture, digests, index, fence and commit included."""

    def __init__(self, store: Store, items: Mapping[str, Any]) -> None:
        self._store = store
        self._items = items
        self._layout = RunLayout(_RUN)
        identity = RunRecord(uid="0" * 32, run=_RUN, created_at=now(), created_by="bench")
        self._checkpointer = Checkpointer(
            InlineDrain(
                JobRunner(store, self._layout, Fence(store, self._layout, 1), incremental=False)
            ),
            identity,
            1,
            extend_lineage(1, None),
            hyperparameters={},
            environment={},
        )
        self._record: CommitRecord | None = None

    def save(self) -> Contestant:
        return Contestant(name=OURS, prepare=lambda number: self.remove(), run=self._save)

    def load(self) -> Contestant:
        return Contestant(name=OURS, run=lambda number: self._load(None))

    def load_model(self) -> Contestant:
        return Contestant(name=f"{OURS}, model only", run=lambda number: self._load(["model"]))

    def remove(self) -> None:
        """Delete what the last save has written."""
        for info in self._store.list_objects(f"{_RUN}/"):
            self._store.delete(info.path)

    def _save(self, number: int) -> None:
        request = SaveRequest(
            position=Position(0, number), decision=SaveDecision("manual", "bench")
        )
        self._record = self._checkpointer.save(capture(self._items), request)

    def _load(self, names: list[str] | None) -> object:
        assert self._record is not None
        loaded = load_checkpoint(self._store, self._layout, self._record, names=names)
        trees = {n: tree for n, tree in loaded.trees.items() if names is None or n in names}

        def tensor_at(position: int) -> torch.Tensor:
            entry = loaded.index.tensors[position]
            return tensor_from_buffer(loaded.tensors[position], entry.dtype, entry.shape)

        return restore_values(trees, tensor_at)


def peers(
    folder: Path, items: Mapping[str, Any]
) -> tuple[list[Contestant], list[Contestant], list[str]]:
    """What others do, to a local folder.

    Returns
    -------
    tuple
        Those that save, those that load what was saved, and a word on each that is missing.
    """
    saves, loads, missing = [], [], []
    for make in (_torch, _safetensors, _dcp):
        made = make(folder, items)
        if isinstance(made, str):
            missing.append(made)
        else:
            saves.append(made[0])
            loads.append(made[1])
    return saves, loads, missing


_Pair = tuple[Contestant, Contestant]


def _torch(folder: Path, items: Mapping[str, Any]) -> _Pair:
    path = folder / "peer.pt"

    def save(number: int) -> None:
        with path.open("wb") as file:
            torch.save(_state_dicts(items), file)
            file.flush()
            os.fsync(file.fileno())

    def load(number: int) -> object:
        return torch.load(path, weights_only=True)

    return _pair("torch.save + fsync", "torch.load", save, load, path)


def _safetensors(folder: Path, items: Mapping[str, Any]) -> _Pair | str:
    if importlib.util.find_spec("safetensors") is None:
        return "safetensors is not installed"
    from safetensors.torch import load_file, save_file

    path = folder / "peer.safetensors"

    def save(number: int) -> None:
        images = capture(items).tensors
        save_file({f"{image.item}.{image.key}": image.data for image in images}, path)
        _fsync(path)

    def load(number: int) -> object:
        return load_file(path)

    return _pair("safetensors + fsync", "safetensors", save, load, path)


def _dcp(folder: Path, items: Mapping[str, Any]) -> _Pair | str:
    from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
    from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
    from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

    path = folder / "peer.dcp"

    def save(number: int) -> None:
        writer = FileSystemWriter(path, sync_files=True, overwrite=True)
        dcp_save(_state_dicts(items), storage_writer=writer, no_dist=True)

    def load(number: int) -> object:
        state = _state_dicts(items)
        dcp_load(state, storage_reader=FileSystemReader(path), no_dist=True)
        return state

    return _pair("DCP", "DCP", save, load, path)


def _pair(
    saved_by: str,
    loaded_by: str,
    save: Callable[[int], object],
    load: Callable[[int], object],
    path: Path,
) -> _Pair:
    return (
        Contestant(name=saved_by, prepare=lambda number: _remove(path), run=save),
        Contestant(name=loaded_by, prepare=lambda number: _drop_cache(path), run=load),
    )


def _state_dicts(items: Mapping[str, Any]) -> dict[str, Any]:
    return {name: item.state_dict() for name, item in items.items()}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _drop_cache(path: Path) -> None:
    """Have the next read come from the disk, as after a restart elsewhere."""
    for file in path.iterdir() if path.is_dir() else [path]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
