"""The records of a store, typed and versioned.

The **commit record** is the checkpoint: a small JSON whose existence commits it. It names, by
digest, one **index** per rank: the list of tensors with their files and chunk digests, and the
tree of all other state. Together they are the manifest.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec

from ckpt_tasks.format.digest import DIGEST_HEX
from ckpt_tasks.replay import Replay
from ckpt_tasks.types import CheckpointId, Number, Position, Scalar, Trigger

__all__ = [
    "FEATURES",
    "FORMAT",
    "LINEAGE_ENTRIES",
    "MAX_COMMIT_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_INDEX_BYTES",
    "ROW_BLOCKS",
    "Ancestor",
    "AttemptClaim",
    "CommitRecord",
    "CompletedRecord",
    "Failure",
    "FileEntry",
    "Heartbeat",
    "Index",
    "IndexRef",
    "LineageEntry",
    "MarkRecord",
    "PassedOver",
    "Process",
    "PromotionRecord",
    "Record",
    "RegistryRunIds",
    "Replica",
    "ResumedRecord",
    "RowBlocks",
    "RunRecord",
    "SharedTensor",
    "TailRecord",
    "TensorEntry",
    "Uptime",
    "now",
]

FORMAT = 1
ROW_BLOCKS = "row-blocks"
"""Some index has `RowBlocks`."""

FEATURES: frozenset[str] = frozenset((ROW_BLOCKS,))
"""Features of the format that this version reads beyond version 1 itself."""

MAX_COMMIT_BYTES = 64 * 1024
LINEAGE_ENTRIES = 100
"""Attempts of a lineage that a record keeps: a run may be preempted thousands of times."""

MAX_INDEX_BYTES = 64 * 1024 * 1024
"""Of a rank's index: some 200,000 tensors. A hostile one may take twenty times as much memory."""

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
_Number = Annotated[int, msgspec.Meta(ge=1, le=999_999_999)]
_Text = Annotated[str, msgspec.Meta(max_length=4096)]
_Uid = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
_Digest = Annotated[str, msgspec.Meta(pattern=f"^[0-9a-f]{{{DIGEST_HEX}}}$")]
_ChunkDigest = Annotated[str, msgspec.Meta(min_length=DIGEST_HEX, max_length=DIGEST_HEX)]
_WriteId = Annotated[str, msgspec.Meta(pattern="^[a-z0-9-]{1,64}$")]


def now() -> str:
    """The time as written in records: UTC, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all records; `format` is the version of the format that wrote it."""

    format: int = FORMAT


class Ancestor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run of which this one was a replica, until it was adopted.

    Parameters
    ----------
    attempts
        How many of its attempts this run has: records of later ones are that run's alone, which
        may go on elsewhere.
    """

    uid: _Uid
    attempts: _Count


class Replica(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a replica comes from: the URL of the store, userinfo masked, and since when."""

    source: _Text
    since: _Text


class RunRecord(Record, frozen=True, kw_only=True):
    """``run.json``: the identity of a run.

    Parameters
    ----------
    uid
        Of a replica, that of the run that it is a replica of.
    ancestors
        Runs whose checkpoints and attempts this one has inherited. Records are immutable and
        digested, so those keep the uid that they were made under.
    replica
        Of a replica: read-only until it is adopted.
    """

    uid: _Uid
    run: _Text
    created_at: _Text
    created_by: _Text
    ancestors: list[Ancestor] | msgspec.UnsetType = msgspec.UNSET
    replica: Replica | msgspec.UnsetType = msgspec.UNSET

    def owns(self, uid: str, attempt: int) -> bool:
        """Whether a record of that run's attempt is this run's."""
        inherited = any(uid == a.uid and attempt <= a.attempts for a in self.ancestors or [])
        return uid == self.uid or inherited


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


class Uptime(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When something was, by a clock that nobody sets.

    Parameters
    ----------
    boot_id
        The kernel's id of a machine's current boot.
    seconds
        Since that boot, time asleep included.
    """

    boot_id: _Text
    seconds: Annotated[float, msgspec.Meta(ge=0)]


class AttemptClaim(Record, frozen=True, kw_only=True):
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


class ResumedRecord(Record, frozen=True, kw_only=True):
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


class Failure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an attempt ended with: equal for two attempts that ended in the same way.

    Parameters
    ----------
    kind
        The exception's type and message, masked and without what differs in each attempt; or
        the name of the signal that killed the trainer; or its exit code.
    step
        Steps done by then, as far as is known.
    """

    kind: _Text
    step: _Count


class Heartbeat(Record, frozen=True, kw_only=True):
    """``attempts/NNNN.heartbeat``: overwritten while the attempt is alive.

    Observers compare `beat` with their own earlier reading, never `at` with their own clock.
    `step` is how far the attempt is known to have come. `failure` stands in the last beats of an
    attempt whose training failed, where that is known: not where the machine was lost, nor where
    storage or a signal to stop was the cause. `replay` is what the steps that it did again have
    shown, once they are behind.
    """

    attempt: _Number
    beat: _Count
    at: _Text
    uptime: Uptime | None = None
    step: _Count | None = None
    ended: bool = False
    failure: Failure | None = None
    replay: Replay | None = None


class TailRecord(Record, frozen=True, kw_only=True):
    """``attempts/NNNN.tail.json``: what an attempt had logged behind its last checkpoint.

    Kept where metrics are published once they are committed. `kept_at` is in seconds since the
    epoch; `rows` as `Index.metrics`.
    """

    attempt: _Number
    kept_at: float
    rows: list[tuple[str, Number, int, int]]


class IndexRef(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rank's index, named by digest. `path` is relative to the run's folder."""

    rank: _Count
    path: _Text
    size: _Count
    digest: _Digest


class CommitRecord(Record, frozen=True, kw_only=True):
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
        Values logged for its own step, inside that step or behind it. Never older ones: they
        were measured on other weights, and would speak of these as if they were theirs.
    nonfinite
        Names of parameters that held NaN or infinity: the checkpoint is unhealthy, and no
        retry starts from it.
    exact
        False where only the data's order, not the random numbers drawn inside loader workers,
        is restored (``data_order_only``).
    timings
        Seconds: ``capture``, ``stage``, ``write``.
    size, written
        Bytes of all the checkpoint's files, and those of them that no earlier write had left.
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
    written: _Count | None = None
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
    dtype: Annotated[str, msgspec.Meta(max_length=16)]
    shape: list[_Count]
    offset: _Count
    size: _Count
    chunks: list[_ChunkDigest]


class SharedTensor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tensor of one rank's trees whose bytes another rank has written.

    Parameters
    ----------
    position
        What the trees refer to it by.
    rank, item, key
        Who wrote it, the tracked name whose file holds it, and its name there.
    digest
        Of this rank's own bytes (see `format.digest.digest_of_chunks`): the commit is refused where
        those that were written are others.
    """

    position: _Count
    rank: _Count
    item: _Text
    key: str
    digest: _Digest


class RowBlocks(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tensor that is saved as several, each of which holds some of its rows.

    Parameters
    ----------
    key
        Its name, which those of its blocks begin with: ``weight[0:4096]``.
    position, count
        What the trees refer to it by, which is the position of its first block; and how many
        blocks follow one another from there.
    """

    key: str
    position: _Count
    count: Annotated[int, msgspec.Meta(ge=2, le=2**62)]

    @property
    def positions(self) -> range:
        """Of all its blocks."""
        return range(self.position, self.position + self.count)


class Index(Record, frozen=True, kw_only=True):
    """``rankNNNN.index.json``: all that one rank saved.

    `items` maps each tracked name to the tree of its state (see `format.tree`), in which
    tensors are references into `tensors`. `metrics` are the rows logged since the previous
    checkpoint of this attempt, as ``[key, value, step, time_ms]``, so that no row is lost with
    the process that was to publish it. Of very many, they are the newest, and the attempt warned.

    Only where several ranks saved: `shared` are the tensors that another rank has written. The
    positions that trees refer to count all tensors of this rank; those that are not shared are
    `tensors`, in order. `nonfinite` names this rank's parameters with NaN or infinity.

    Only where tensors were split on request: `row_blocks` are these, in the order of positions.
    """

    rank: _Count
    world_size: _Number
    files: list[FileEntry]
    tensors: list[TensorEntry]
    items: dict[str, Any]
    metrics: list[tuple[str, Number, _Count, _Count]] = []
    shared: list[SharedTensor] | msgspec.UnsetType = msgspec.UNSET
    nonfinite: list[_Text] | msgspec.UnsetType = msgspec.UNSET
    row_blocks: list[RowBlocks] | msgspec.UnsetType = msgspec.UNSET


class MarkRecord(Record, frozen=True, kw_only=True):
    """``marks/<kind>/<id>``: a pin, an expiry, a quarantine, a collection under way."""

    checkpoint: _Text
    why: _Text
    by: _Text
    at: _Text
    uptime: Uptime | None = None


class CompletedRecord(Record, frozen=True, kw_only=True):
    """``marks/completed.json``: the run is complete; nothing is left to train."""

    uid: _Text
    attempt: _Number
    checkpoint: _Text | None
    position: Position
    completed_at: _Text


class PromotionRecord(Record, frozen=True, kw_only=True):
    """``marks/promoted/<alias>.json``: an alias was pointed at a checkpoint in a registry.

    Only a registry knows what an alias holds now; this is for one that has lost it.

    Parameters
    ----------
    uid
        Of the checkpoint's run.
    registry
        The registry's name, as its ids are kept under.
    registered_model, model_id
        What of that registry was promoted.
    """

    uid: _Uid
    checkpoint: _Text
    alias: _Text
    registry: _Text
    registered_model: _Text
    model_id: _Text
    at: _Text


class RegistryRunIds(Record, frozen=True, kw_only=True):
    """``<registry>.json``: how to find the run again in a registry; userinfo never included."""

    tracking_uri: _Text
    experiment_id: _Text
    experiment: _Text
    run_id: _Text
    registered_model: _Text
