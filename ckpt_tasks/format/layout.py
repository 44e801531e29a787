"""Where things lie in a store. The one module that spells paths.

All paths are relative to the store's root, with ``/`` as separator::

    <run>/run.json                     identity (uid); replaced once, where a replica is adopted
    <run>/mlflow.json                  ids of the run in a registry
    <run>/attempts/0002.json           the claim of an attempt
    <run>/attempts/0002.resumed.json   what it resumed from
    <run>/attempts/0002.heartbeat      overwritten while it is alive
    <run>/attempts/0002.tail.json      metrics behind its last checkpoint, unsent
    <run>/commits/<id>.json            the commit record
    <run>/data/<write-id>/rank0000.index.json
    <run>/data/<write-id>/<name>.rank0000.safetensors
    <run>/marks/<kind>/<id>, <run>/marks/completed.json, <run>/marks/collected.json
    <run>/marks/promoted/<alias>.json  the checkpoint that an alias was last pointed at
    .ckpt_tasks/promoted/<model>/<alias>.json   and of all runs of a registered model the last one
"""

from __future__ import annotations

import re
from typing import Literal, get_args
from urllib.parse import unquote_to_bytes

from ckpt_tasks.errors import ConfigError
from ckpt_tasks.types import CheckpointId

__all__ = [
    "MARK_KINDS",
    "MarkKind",
    "RunLayout",
    "check_relative",
    "decode_name",
    "encode_name",
    "last_promotion",
]

MarkKind = Literal["pins", "expired", "quarantined", "collecting", "verified"]
MARK_KINDS: tuple[MarkKind, ...] = get_args(MarkKind)

_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-.")
_ENCODED = re.compile(r"(?:[A-Za-z0-9_\-.]|%[0-9A-F]{2})+", re.ASCII)
_MAX_ENCODED = 180  # below the 255 bytes of a file name, with room for ".rank0000.rows.safetensors"
_WRITE = re.compile(r"/data/a([0-9]{4,9})-s([0-9]{4,9})-[0-9a-z]+/", re.ASCII)
_ATTEMPT = re.compile(r"([0-9]{4,9})\.json", re.ASCII)


def encode_name(name: str, *, what: str = "run name") -> str:
    """Turn any text into one safe path component, reversibly.

    Letters, digits and ``_ - .`` stay; every other byte of the UTF-8 form, and a leading dot,
    becomes ``%XX``. Raises `ConfigError` when `name` is empty, too long, or no valid unicode.
    """
    if not name:
        raise ConfigError(f"the {what} is empty; give it at least one character")
    try:
        raw = name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"the {what} {name!r} is not valid unicode: {error.reason}") from error
    encoded = "".join(
        chr(byte) if byte in _PLAIN and not (index == 0 and byte == 0x2E) else f"%{byte:02X}"
        for index, byte in enumerate(raw)
    )
    if len(encoded) > _MAX_ENCODED:
        raise ConfigError(
            f"the {what} {name[:40]!r}... takes {len(encoded)} bytes when encoded, more than the "
            f"{_MAX_ENCODED} that a file name leaves; choose a shorter one"
        )
    return encoded


def decode_name(component: str) -> str:
    """Inverse of `encode_name`; raises ``ValueError`` for anything `encode_name` never makes."""
    if not _ENCODED.fullmatch(component):
        raise ValueError(f"{component!r} is not an encoded name")
    name = unquote_to_bytes(component).decode("utf-8")
    try:
        same = encode_name(name) == component
    except ConfigError as error:
        raise ValueError(f"{component!r} is not an encoded name") from error
    if not same:
        raise ValueError(f"{component!r} is not an encoded name")
    return name


def check_relative(path: str) -> str:
    """Return `path` if it is relative, normal and free of ``..``; else raise ``ValueError``.

    Paths read from a store pass through here before they are opened.
    """
    parts = path.split("/")
    if "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{path!r} is not a plain relative path")
    return path


def last_promotion(registered_model: str, alias: str) -> str:
    """Which run an alias was last pointed at a checkpoint of; hidden, as no run's."""
    model = encode_name(registered_model, what="registered model")
    return f".ckpt_tasks/promoted/{model}/{encode_name(alias, what='alias')}.json"


class RunLayout:
    """Paths of one run, relative to the store's root.

    Parameters
    ----------
    run
        The run's name, any text.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self.root = encode_name(run)

    @property
    def run_record(self) -> str:
        return f"{self.root}/run.json"

    def registry_ids(self, registry: str) -> str:
        return f"{self.root}/{encode_name(registry, what='registry name')}.json"

    @property
    def attempts(self) -> str:
        return f"{self.root}/attempts/"

    def attempt(self, number: int) -> str:
        return f"{self.attempts}{number:04d}.json"

    def resumed(self, number: int) -> str:
        return f"{self.attempts}{number:04d}.resumed.json"

    def heartbeat(self, number: int) -> str:
        return f"{self.attempts}{number:04d}.heartbeat"

    def tail(self, number: int) -> str:
        return f"{self.attempts}{number:04d}.tail.json"

    @staticmethod
    def write_of(path: str) -> tuple[int, int] | None:
        """Attempt and sequence of the write that a path under `data` belongs to, or ``None``."""
        match = _WRITE.search(f"/{path}")
        return (int(match[1]), int(match[2])) if match else None

    @property
    def folder(self) -> str:
        """Prefix of everything that the run has."""
        return f"{self.root}/"

    @property
    def commits(self) -> str:
        return f"{self.root}/commits/"

    def commit(self, checkpoint: CheckpointId) -> str:
        return f"{self.commits}{checkpoint}.json"

    @property
    def data(self) -> str:
        return f"{self.root}/data/"

    @staticmethod
    def write_folder_in_run(write_id: str) -> str:
        """Folder of one write, relative to the run's folder, as index and record name it."""
        return f"data/{write_id}"

    @staticmethod
    def index_name(rank: int) -> str:
        return f"rank{rank:04d}.index.json"

    @staticmethod
    def tensors_name(name: str, rank: int, *, rows: bool = False) -> str:
        """File name for the tensors of a tracked name, or for its blocks of rows."""
        kind = ".rows" if rows else ""
        return f"{encode_name(name, what='tracked name')}.rank{rank:04d}{kind}.safetensors"

    @staticmethod
    def tracked_name(path: str, rank: int) -> str:
        """Inverse of `tensors_name`; a file name that it never makes is returned as it is."""
        name = path.rpartition("/")[2]
        try:
            return decode_name(re.sub(rf"\.rank{rank:04d}(\.rows)?\.safetensors\Z", "", name))
        except ValueError:
            return name

    def in_run(self, path: str) -> str:
        """Path from the store's root of a `path` relative to the run's folder, checked."""
        return f"{self.root}/{check_relative(path)}"

    @property
    def all_marks(self) -> str:
        return f"{self.root}/marks/"

    def marks(self, kind: MarkKind) -> str:
        return f"{self.all_marks}{kind}/"

    def mark(self, kind: MarkKind, checkpoint: CheckpointId) -> str:
        return f"{self.marks(kind)}{checkpoint}"

    @property
    def completed(self) -> str:
        return f"{self.all_marks}completed.json"

    @property
    def collected(self) -> str:
        """Overwritten by each collection: by its time stamp the store tells what time it is."""
        return f"{self.all_marks}collected.json"

    @property
    def promotions(self) -> str:
        return f"{self.all_marks}promoted/"

    def promotion(self, alias: str) -> str:
        return f"{self.promotions}{encode_name(alias, what='alias')}.json"

    @staticmethod
    def attempt_number(path: str) -> int | None:
        """The attempt that a path under `attempts` claims, or ``None`` if it is no claim."""
        name = path.rpartition("/")[2]
        match = _ATTEMPT.fullmatch(name)
        number = int(match[1]) if match else 0
        return number if number and name == f"{number:04d}.json" else None

    @staticmethod
    def checkpoint_id(path: str) -> CheckpointId | None:
        """The checkpoint that a path under `commits` or `marks` names, or ``None``."""
        name = path.rpartition("/")[2]
        try:
            return CheckpointId.parse(name.removesuffix(".json"))
        except ValueError:
            return None
