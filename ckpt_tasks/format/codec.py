"""Records to bytes and back, validated.

Nothing that is read is trusted: damage, unknown fields, wrong types, paths that leave the run's
folder, sizes that do not add up and features this version does not know are refused.
"""

from __future__ import annotations

import itertools
import re
from typing import Any, TypeVar

import msgspec

from ckpt_tasks.errors import ConfigError, CorruptCheckpointError, UnsupportedFormatError
from ckpt_tasks.format.digest import CHUNK_BYTES, DIGEST_HEX, digest
from ckpt_tasks.format.distinct import check_distinct
from ckpt_tasks.format.layout import check_relative
from ckpt_tasks.format.records import (
    FEATURES,
    FORMAT,
    MAX_HEADER_BYTES,
    MAX_INDEX_BYTES,
    CommitRecord,
    CompletedRecord,
    Index,
    LineageEntry,
    PromotionRecord,
    Record,
    ResumedRecord,
)
from ckpt_tasks.types import CheckpointId

__all__ = ["decode", "encode", "index_digest"]

R = TypeVar("R", bound=Record)


def encode(record: Record) -> bytes:
    """A record's bytes: JSON, indented for people except for the index, with a checksum.

    The last field, ``checksum``, is the digest of every byte before it, so that a flipped bit
    in a record that is still valid JSON is found too. Later formats must keep it as it is, or
    this version takes their records for damaged ones.

    Raises `ConfigError` for a record that `decode` would refuse, such as one with a text that
    is too long: better no record than one that nobody can read.
    """
    body = _body(record)
    try:
        _parse(body + b"}", type(record))
    except _MALFORMED as error:
        raise ConfigError(f"cannot write {type(record).__name__}: {error}") from error
    return body + _SEAL % digest(body).encode("ascii")


def _body(record: Record) -> bytes:
    """A record's JSON as `encode` writes it, but for the last brace."""
    data = msgspec.json.encode(record)
    if not isinstance(record, Index):
        data = msgspec.json.format(data, indent=1)
    return data[: data.rindex(b"}")].rstrip()


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
        return _parse(body, kind)
    except _MALFORMED as error:
        raise CorruptCheckpointError(f"{path} is not a valid {kind.__name__}: {error}") from error


_MALFORMED = (msgspec.MsgspecError, ValueError, RecursionError)


def _parse(body: bytes, kind: type[R]) -> R:
    """The record that some JSON is; raises what is in `_MALFORMED` where it is none."""
    record: R = _DECODERS[kind].decode(body)
    check_distinct(body, _body(record) + b"}")
    _validate(record)
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
    kind: msgspec.json.Decoder(kind) for kind in Record.__subclasses__()
}
_VERSION_DECODER = msgspec.json.Decoder(_Version)


def _check_version(data: bytes, path: str) -> None:
    """Tell a newer format from damage before a strict decode would call it damage."""
    try:
        version = _VERSION_DECODER.decode(data)
    except _MALFORMED as error:
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


def _validate(record: Record) -> None:
    if isinstance(record, CommitRecord):
        _validate_commit(record)
    elif isinstance(record, ResumedRecord):
        _validate_lineage(record.lineage, record.attempt)
        if record.lineage[0].resumed_from != record.checkpoint:
            raise ValueError(f"lineage does not start from {record.checkpoint}")
    elif isinstance(record, (CompletedRecord, PromotionRecord)):
        if record.checkpoint is not None:
            CheckpointId.parse(record.checkpoint)
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
        start = 0
        if entry.resumed_from is not None:
            start = CheckpointId.parse(entry.resumed_from).attempt
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
    _validate_texts(index)
    _validate_shared(index)
    _validate_row_blocks(index)


def _validate_texts(index: Index) -> None:
    """What all tensors have, at once: a pattern for each takes longer than all else in an index."""
    unknown = [name for name in {t.dtype for t in index.tensors} if not _DTYPE.fullmatch(name)]
    if unknown:
        raise ValueError(f"a tensor has dtype {unknown[0]!r}")
    digests = "".join(chunk for tensor in index.tensors for chunk in tensor.chunks)
    if digests.encode().translate(None, delete=b"0123456789abcdef"):
        raise ValueError("a chunk digest has other than hexadecimal digits")


_DTYPE = re.compile("[A-Z0-9_]{1,16}")


def _validate_shared(index: Index) -> None:
    shared = index.shared or []
    total = len(index.tensors) + len(shared)
    if len({entry.position for entry in shared}) != len(shared):
        raise ValueError("a shared tensor stands twice")
    for entry in shared:
        if entry.position >= total:
            raise ValueError(f"shared tensor {entry.key!r} at position {entry.position} of {total}")
        if entry.rank >= index.world_size or entry.rank == index.rank:
            raise ValueError(f"shared tensor {entry.key!r} names rank {entry.rank}")


def _validate_row_blocks(index: Index) -> None:
    total = len(index.tensors) + len(index.shared or [])
    stop = 0
    for tensor in index.row_blocks or []:
        if not stop <= tensor.position <= total - tensor.count:
            raise ValueError(
                f"{tensor.key!r} lies in {tensor.count} of {total} tensors, from the "
                f"{tensor.position}th on"
            )
        stop = tensor.position + tensor.count


def index_digest(data: bytes) -> str:
    """The digest under which a commit record names an index: over its raw bytes."""
    return digest(data)
