"""The records of a store, typed, versioned, and validated when read.

The **commit record** is the checkpoint: a small JSON whose existence commits it. It names, by
digest, one **index** per rank: the list of tensors with their files and chunk digests, and the
tree of all other state. Together they are the manifest.

Nothing read here is trusted: unknown fields, wrong types, paths that leave the run's folder,
sizes that do not add up and features this version does not know are refused.
"""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import msgspec

from ckpt_tasks.errors import ConfigError, CorruptCheckpointError, UnsupportedFormatError
from ckpt_tasks.format.digest import CHUNK_BYTES, DIGEST_HEX, digest
from ckpt_tasks.format.layout import check_relative
from ckpt_tasks.types import CheckpointId, Number, Position, Scalar, Trigger

__all__ = [
    "FEATURES",
    "FORMAT",
    "LINEAGE_ENTRIES",
    "MAX_COMMIT_BYTES",
    "MAX_INDEX_BYTES",
    "AttemptClaim",
    "CommitRecord",
    "CompletedRecord",
    "FileEntry",
    "Heartbeat",
    "Index",
    "IndexRef",
    "LineageEntry",
    "MarkRecord",
    "PassedOver",
    "Process",
    "RegistryRunIds",
    "ResumedRecord",
    "RunRecord",
    "TensorEntry",
    "decode",
    "encode",
    "index_digest",
    "now",
]

FORMAT = 1
FEATURES: frozenset[str] = frozenset()
"""Features of the format that this version reads beyond version 1 itself."""

MAX_COMMIT_BYTES = 64 * 1024
LINEAGE_ENTRIES = 100
"""Attempts of a lineage that a record keeps: a run may be preempted thousands of times."""

MAX_INDEX_BYTES = 256 * 1024 * 1024
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
_Number = Annotated[int, msgspec.Meta(ge=1, le=999_999_999)]
_Text = Annotated[str, msgspec.Meta(max_length=4096)]
_Digest = Annotated[str, msgspec.Meta(pattern=f"^[0-9a-f]{{{DIGEST_HEX}}}$")]
_WriteId = Annotated[str, msgspec.Meta(pattern="^[a-z0-9-]{1,64}$")]


def now() -> str:
    """The time as written in records: UTC, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: int = FORMAT


class RunRecord(_Record, frozen=True, kw_only=True):
    """``run.json``: the identity of a run."""

    uid: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    run: _Text
    created_at: _Text
    created_by: _Text


class Process(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A process, told apart from a later one that got the same pid.

    Parameters
    ----------
    host, boot_id
        Name of the machine, and the kernel's id of its current boot.
    pid, started
        Process id, and its start time in clock ticks since boot (field 22 of
        ``/proc/<pid>/stat``).
    """

    host: _Text
    boot_id: _Text
    pid: _Count
    started: _Count


class AttemptClaim(_Record, frozen=True, kw_only=True):
    """``attempts/NNNN.json``: who executes the run under this number.

    `claim_id` tells this claim from another's when the answer to the create was lost.
    """

    uid: _Text
    attempt: _Number
    claim_id: _Text
    invocation: _Text
    process: Process
    claimed_at: _Text
    entrypoint: _Text
    hyperparameters: dict[str, Scalar]
    resume: _Text = "auto"
    tags: dict[str, _Text] = {}


class LineageEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An attempt and the checkpoint it started from."""

    attempt: _Number
    resumed_from: _Text | None


class PassedOver(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A newer checkpoint that an attempt did not start from, and why."""

    checkpoint: _Text
    why: _Text


class ResumedRecord(_Record, frozen=True, kw_only=True):
    """``attempts/NNNN.resumed.json``: what the attempt starts from; written before it trains.

    `checkpoint` is ``None`` where it starts from the beginning. `lineage` goes from this attempt
    back, `LINEAGE_ENTRIES` at most, so that damage to an earlier record breaks no chain.
    """

    attempt: _Number
    checkpoint: _Text | None
    lineage: list[LineageEntry]
    why: _Text
    passed_over: list[PassedOver] = []
    resumed_at: _Text


class Heartbeat(_Record, frozen=True, kw_only=True):
    """``attempts/NNNN.heartbeat``: overwritten while the attempt is alive.

    Observers compare `beat` with their own earlier reading, never `at` with their own clock.
    `step` is how far the attempt is known to have come.
    """

    attempt: _Number
    beat: _Count
    at: _Text
    step: _Count | None = None
    ended: bool = False


class IndexRef(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rank's index, named by digest. `path` is relative to the run's folder."""

    rank: _Count
    path: _Text
    size: _Count
    digest: _Digest


class CommitRecord(_Record, frozen=True, kw_only=True):
    """``commits/<id>.json``: its existence is the checkpoint.

    Parameters
    ----------
    required_features
        A reader that does not know one of these neither reads nor collects the checkpoint.
    uid, id, write_id
        Of the run, of the checkpoint, and of the write that made it.
    lineage
        From this attempt back, `LINEAGE_ENTRIES` at most.
    metrics
        The latest value of each metric at this position.
    nonfinite
        Names of parameters that held NaN or infinity: the checkpoint is unhealthy, and no
        retry starts from it.
    exact
        False where only the data's order, not the random numbers drawn inside loader workers,
        is restored (``data_order_only``).
    timings
        Seconds: ``capture``, ``write``.
    size
        Bytes of all the checkpoint's files.
    """

    required_features: list[_Text] = []
    uid: _Text
    id: _Text
    write_id: _WriteId
    position: Position
    lineage: list[LineageEntry]
    hyperparameters: dict[str, Scalar]
    metrics: dict[str, Number]
    trigger: Trigger
    reason: _Text
    timings: dict[str, float]
    environment: dict[str, _Text]
    world_size: _Number
    size: _Count
    indexes: list[IndexRef]
    nonfinite: list[_Text] = []
    exact: bool = True
    created_at: _Text

    @property
    def checkpoint(self) -> CheckpointId:
        return CheckpointId.parse(self.id)


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One safetensors file. `path` is relative to the run's folder, so that an index can name
    the file of an earlier write; `header_size` counts the 8 length bytes too.
    """

    path: _Text
    size: _Count
    header_size: _Count
    header_digest: _Digest


class TensorEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where one tensor's bytes lie, and what they are.

    Parameters
    ----------
    file
        Index into the index's `files`.
    key
        The tensor's name inside that file.
    dtype, shape
        As the safetensors header gives them.
    offset, size
        Its bytes in the file, from the file's first byte.
    chunks
        Digest of each chunk of `CHUNK_BYTES`, the last one shorter.
    """

    file: _Count
    key: _Text
    dtype: Annotated[str, msgspec.Meta(pattern="^[A-Z0-9_]{1,16}$")]
    shape: list[_Count]
    offset: _Count
    size: _Count
    chunks: list[_Digest]


class Index(_Record, frozen=True, kw_only=True):
    """``rankNNNN.index.json``: all that one rank saved.

    `items` maps each tracked name to the tree of its state (see `format.tree`), in which
    tensors are references into `tensors`. `metrics` are the rows logged since the previous
    checkpoint of this attempt, as ``[key, value, step, time_ms]``, so that no row is lost with
    the process that was to publish it.
    """

    rank: _Count
    world_size: _Number
    files: list[FileEntry]
    tensors: list[TensorEntry]
    items: dict[str, Any]
    metrics: list[tuple[str, Number, _Count, _Count]] = []


class MarkRecord(_Record, frozen=True, kw_only=True):
    """``marks/<kind>/<id>``: a pin, an expiry, a quarantine, a collection under way."""

    checkpoint: _Text
    why: _Text
    by: _Text
    at: _Text


class CompletedRecord(_Record, frozen=True, kw_only=True):
    """``marks/completed.json``: the run is complete; nothing is left to train."""

    uid: _Text
    attempt: _Number
    checkpoint: _Text | None
    position: Position
    completed_at: _Text


class RegistryRunIds(_Record, frozen=True, kw_only=True):
    """``<registry>.json``: how to find the run again in a registry; userinfo never included."""

    tracking_uri: _Text
    experiment_id: _Text
    experiment: _Text
    run_id: _Text
    registered_model: _Text


R = TypeVar("R", bound=_Record)


def encode(record: _Record) -> bytes:
    """A record's bytes: JSON, indented for people except for the index, with a checksum.

    The last field, ``checksum``, is the digest of every byte before it, so that a flipped bit
    in a record that is still valid JSON is found too. Later formats must keep it as it is, or
    this version takes their records for damaged ones.

    Raises `ConfigError` for a record that `decode` would refuse, such as one with a text that
    is too long: better no record than one that nobody can read.
    """
    data = msgspec.json.encode(record)
    if not isinstance(record, Index):
        data = msgspec.json.format(data, indent=1)
    body = data[: data.rindex(b"}")].rstrip()
    data = body + _SEAL % digest(body).encode("ascii")
    try:
        decode(data, type(record), path="the new record")
    except CorruptCheckpointError as error:
        raise ConfigError(f"cannot write {type(record).__name__}: {error.__cause__}") from error
    return data


def decode(data: bytes, kind: type[R], *, path: str) -> R:
    """Read and validate a record.

    Parameters
    ----------
    data
        The bytes as stored.
    kind
        Which record it should be.
    path
        Where it was read, for messages.

    Raises
    ------
    UnsupportedFormatError
        A later format, or a required feature that this version does not know.
    CorruptCheckpointError
        Anything else that is not a valid record of this kind.
    """
    body = _unseal(data, path)
    _check_version(body, path)
    try:
        record: R = _DECODERS[kind].decode(body)
        _validate(record)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path} is not a valid {kind.__name__}: {error}") from error
    return record


_SEAL = b',\n "checksum": "%s"\n}\n'
_SEAL_BYTES = len(_SEAL % (b"0" * DIGEST_HEX))


def _unseal(data: bytes, path: str) -> bytes:
    """The record's JSON without its checksum, once that has been found right."""
    body, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    if seal != _SEAL % digest(body).encode("ascii"):
        raise CorruptCheckpointError(
            f"{path} is damaged: its checksum does not match its {len(data)} bytes"
        )
    return body + b"}"


class _Version(msgspec.Struct):
    format: int
    required_features: list[str] = []


# Made at import: msgspec resolves a type's fields when it first meets it, and two threads that
# do so at once crash the interpreter (seen with 0.22). Catalogs read records in many threads.
_DECODERS: dict[type, msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(kind) for kind in _Record.__subclasses__()
}
_VERSION_DECODER = msgspec.json.Decoder(_Version)


def _check_version(data: bytes, path: str) -> None:
    """Tell a newer format from damage before a strict decode would call it damage."""
    try:
        version = _VERSION_DECODER.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path} is not a record: {error}") from error
    unknown = sorted(set(version.required_features) - FEATURES)
    if version.format > FORMAT or unknown:
        what = f"format {version.format}" if version.format > FORMAT else f"features {unknown}"
        raise UnsupportedFormatError(
            f"{path} uses {what}, which this version (format {FORMAT}) cannot read; "
            "upgrade ckpt-tasks"
        )
    if version.format < 1:
        raise CorruptCheckpointError(f"{path} claims format {version.format}")


def _validate(record: _Record) -> None:
    if isinstance(record, CommitRecord):
        _validate_commit(record)
    elif isinstance(record, ResumedRecord):
        _validate_lineage(record.lineage, record.attempt)
        if record.lineage[0].resumed_from != record.checkpoint:
            raise ValueError(f"lineage does not start from {record.checkpoint}")
    elif isinstance(record, Index):
        _validate_index(record)


def _validate_commit(record: CommitRecord) -> None:
    checkpoint = CheckpointId.parse(record.id)
    if checkpoint.step != record.position.step:
        raise ValueError(f"id {record.id} does not match step {record.position.step}")
    ranks = sorted(ref.rank for ref in record.indexes)
    # Lengths first: a list of the ranks of a hostile world size would take gigabytes.
    if len(ranks) != record.world_size or ranks != list(range(record.world_size)):
        raise ValueError(f"indexes do not cover ranks 0..{record.world_size - 1}")
    _validate_lineage(record.lineage, checkpoint.attempt)
    for ref in record.indexes:
        check_relative(ref.path)
        if ref.size > MAX_INDEX_BYTES:
            raise ValueError(f"index of {ref.size} bytes")


def _validate_lineage(lineage: list[LineageEntry], attempt: int) -> None:
    if not lineage or lineage[0].attempt != attempt:
        raise ValueError(f"lineage does not start at attempt {attempt}")
    for entry, earlier in itertools.zip_longest(lineage, lineage[1:]):
        start = CheckpointId.parse(entry.resumed_from).attempt if entry.resumed_from else 0
        if start >= entry.attempt or (earlier is not None and start != earlier.attempt):
            raise ValueError(f"lineage breaks behind attempt {entry.attempt}")


def _validate_index(index: Index) -> None:
    if index.rank >= index.world_size:
        raise ValueError(f"rank {index.rank} of {index.world_size}")
    for file in index.files:
        check_relative(file.path)
        if not 8 <= file.header_size <= min(file.size, MAX_HEADER_BYTES + 8):
            raise ValueError(f"{file.path}: header of {file.header_size} of {file.size} bytes")
    for tensor in index.tensors:
        if tensor.file >= len(index.files):
            raise ValueError(f"tensor {tensor.key!r} names file {tensor.file}")
        file = index.files[tensor.file]
        if tensor.offset < file.header_size or tensor.offset + tensor.size > file.size:
            raise ValueError(f"tensor {tensor.key!r} lies outside {file.path}")
        if len(tensor.chunks) != -(-tensor.size // CHUNK_BYTES):
            raise ValueError(f"tensor {tensor.key!r} has {len(tensor.chunks)} chunk digests")


def index_digest(data: bytes) -> str:
    """The digest under which a commit record names an index: over its raw bytes."""
    return digest(data)
