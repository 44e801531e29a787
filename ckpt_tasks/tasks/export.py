"""A checkpoint in a form that others open: of it, or of some tracked names, verified and whole.

Forms are found by name: safetensors and torch are this package's own, further ones are offered as
entry points of the group ``ckpt_tasks.exporters``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import msgspec

from ckpt_tasks.checkpointer.catalog import RunView, view_run
from ckpt_tasks.config import StoreConfig
from ckpt_tasks.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    StoreError,
)
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord
from ckpt_tasks.store import Store, open_existing_store
from ckpt_tasks.suggest import did_you_mean
from ckpt_tasks.tasks.export_safetensors import export_safetensors
from ckpt_tasks.tasks.export_torch import export_torch
from ckpt_tasks.tasks.exporting import Exporter, ExportRequest, ExportSource

__all__ = [
    "ExportReport",
    "ExportedFile",
    "export",
    "export_formats",
    "export_from",
]

_GROUP = "ckpt_tasks.exporters"
_OWN: Mapping[str, Exporter] = {"safetensors": export_safetensors, "torch": export_torch}


class ExportedFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file, relative to the folder that was made, and its bytes."""

    path: str
    size: int


class ExportReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was exported."""

    run: str
    checkpoint: str
    step: int
    epoch: int
    to: str
    output: str
    names: list[str]
    files: list[ExportedFile]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def export(
    store: StoreConfig,
    run: str,
    to: str,
    output: str,
    *,
    checkpoint: str | None = None,
    request: ExportRequest | None = None,
) -> ExportReport:
    """Write a checkpoint, or some tracked names of it, in another form.

    Every byte is verified before it is written. The file or folder appears whole, under its name,
    when all of it is on the disk, or not at all.

    Parameters
    ----------
    to
        ``safetensors``: a folder with a file for each tracked name; ``torch``: a file; or a form
        that an installed package offers, such as ``mlflow-model``.
    output
        A path on this machine where nothing is yet, in a folder that there is.
    checkpoint
        Default: the newest from which a retry would start.

    Raises
    ------
    ConfigError
        There is no such form, the checkpoint does not have what is asked for or cannot be
        represented in it, or there is something at `output`.
    CheckpointNotFoundError
        There is no such run or checkpoint, or a collection has removed it meanwhile.
    CorruptCheckpointError
        It is damaged.
    StoreError
        Storage failed, or the file system of `output` did.
    """
    with open_existing_store(store) as opened:
        return export_from(opened, run, to, output, checkpoint=checkpoint, request=request)


def export_from(
    store: Store,
    run: str,
    to: str,
    output: str,
    *,
    checkpoint: str | None = None,
    request: ExportRequest | None = None,
) -> ExportReport:
    """As `export`, from a store that is open."""
    exporter = _load(to)
    target = _target(output)
    record = _record(view_run(store, run), checkpoint)
    source = ExportSource(store=store, layout=RunLayout(run), record=record)
    with _made_whole(target) as temporary, _collections_told(source):
        names = exporter(source, request or ExportRequest(), temporary)
    return ExportReport(
        run=run,
        checkpoint=record.id,
        step=record.position.step,
        epoch=record.position.epoch,
        to=to,
        output=str(target),
        names=names,
        files=list(_files(target)),
    )


def export_formats() -> list[str]:
    """Names of all forms, those that other packages offer too."""
    return sorted({*_OWN, *_offered()})


def _offered() -> Mapping[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=_GROUP)}


def _load(to: str) -> Exporter:
    if to not in export_formats():
        hint = did_you_mean(to, export_formats(), what="forms")
        raise ConfigError(f"cannot export to {to!r}; {hint}")
    if to in _OWN:
        return _OWN[to]
    try:
        exporter: Exporter = _offered()[to].load()
    except ImportError as error:
        raise ConfigError(
            f"exporting to {to!r} needs what is not installed ({error}); "
            "pip install 'ckpt-tasks[torch,mlflow]'"
        ) from error
    return exporter


def _target(output: str) -> Path:
    if "://" in output:
        raise ConfigError(f"{output} is no path: an export is written on this machine")
    target = Path(os.path.abspath(os.path.expanduser(output)))
    if os.path.lexists(target):
        raise _taken(target)
    if not target.parent.is_dir():
        raise ConfigError(f"there is no folder {target.parent} to put {target.name} into")
    return target


def _taken(target: Path) -> ConfigError:
    return ConfigError(f"{target} exists; nothing is overwritten: remove it, or name another path")


def _record(view: RunView, checkpoint: str | None) -> CommitRecord:
    if checkpoint is None:
        found = view.newest
    else:
        found = next((c for c in view.checkpoints if c.id == checkpoint), None)
        if found is not None and found.record is None:
            raise CorruptCheckpointError(f"{checkpoint} of run {view.run.run!r}: {found.why}")
    if found is None or found.record is None:
        which = f"checkpoint {checkpoint}" if checkpoint else "checkpoint that can be restored"
        raise CheckpointNotFoundError(
            f"run {view.run.run!r} has no {which}; `ckpt-tasks ls` shows what it has"
        )
    return found.record


@contextlib.contextmanager
def _made_whole(target: Path) -> Iterator[Path]:
    """A hidden name beside the target, of what gets the target's name or is removed."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        yield temporary
        _make_durable(temporary)
        _give_name(temporary, target)
        _sync(target.parent)
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"cannot write {target}: {error}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def _give_name(temporary: Path, target: Path) -> None:
    if os.path.lexists(target):  # since it was looked for
        raise _taken(target)
    temporary.rename(target)


def _make_durable(path: Path) -> None:
    inner = sorted(path.rglob("*"), reverse=True) if path.is_dir() else []
    for each in (*inner, path):
        _sync(each)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _collections_told(source: ExportSource) -> Iterator[None]:
    """A checkpoint that a collection removes while it is read looks damaged."""
    store, layout, checkpoint = source.store, source.layout, source.record.checkpoint
    try:
        yield
    except CorruptCheckpointError as error:
        # The mark comes before the first byte that goes, and goes after the record.
        if store.exists(layout.mark("collecting", checkpoint)) or not store.exists(
            layout.commit(checkpoint)
        ):
            raise CheckpointNotFoundError(
                f"{checkpoint} of run {layout.run!r} was removed by a collection while it was "
                "exported; pin a checkpoint to keep it"
            ) from error
        raise


def _files(target: Path) -> Iterator[ExportedFile]:
    if target.is_file():
        yield ExportedFile(path=target.name, size=target.stat().st_size)
        return
    for path in sorted(target.rglob("*")):
        if path.is_file():
            yield ExportedFile(path=str(path.relative_to(target)), size=path.stat().st_size)
