"""Recovery of many ranks: rank 0 chooses, all load and verify, and start from the same place.

Each rank reads the tensors that it will ask for, or its share of them, so that every byte is known
to be whole before any rank goes on, and none is read twice. Damage that one of them finds is damage
for all.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from ckpt_tasks.checkpointer.sharded_reader import ShardedCheckpoint, open_sharded
from ckpt_tasks.errors import AttemptFailedError, CkptTasksError, CorruptCheckpointError, StoreError
from ckpt_tasks.fencing.lineage import Lineage
from ckpt_tasks.format.codec import decode, encode
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord, ResumedRecord
from ckpt_tasks.recovery.recover import Recovered
from ckpt_tasks.store.base import Store
from ckpt_tasks.training.ranks.agreement import RankAgreement

__all__ = ["RankedRecovery"]


class _Load(msgspec.Struct, frozen=True, tag=True):
    """Load this checkpoint, and say how it went."""

    record: bytes


class _Begin(msgspec.Struct, frozen=True, tag=True):
    """Start from the checkpoint that was loaded last, or from the beginning."""

    resumed: bytes
    asked_for: bool


class _Stop(msgspec.Struct, frozen=True, tag=True):
    """There is no start, for this reason."""

    why: str


class _Loaded(msgspec.Struct, frozen=True):
    """How one rank's loading went."""

    went: Literal["well", "corrupt", "failed"]
    why: str = ""


class RankedRecovery:
    """One rank's side of a recovery.

    Parameters
    ----------
    seconds
        How long one rank may take to load.
    """

    def __init__(
        self, store: Store, layout: RunLayout, agreement: RankAgreement, *, seconds: float = 3600.0
    ) -> None:
        self._store = store
        self._layout = layout
        self._agreement = agreement
        self._seconds = seconds
        self._number = 0

    # -- rank 0 -------------------------------------------------------------------------------

    def load(self, record: CommitRecord) -> ShardedCheckpoint:
        """On rank 0, for `recovery.recover`: all ranks load a checkpoint.

        Raises
        ------
        CorruptCheckpointError
            A rank has found damage.
        StoreError
            A rank could not read, or has said nothing in time.
        """
        self._order(_Load(encode(record)))
        opened, own = self._loaded(record)
        for rank, loaded in enumerate(self._reports(own)):
            if loaded.went == "corrupt":
                raise CorruptCheckpointError(f"rank {rank}: {loaded.why}")
            if loaded.went == "failed":
                raise StoreError(f"rank {rank} could not load {record.id}: {loaded.why}")
        assert opened is not None
        return opened

    def begin(self, recovered: Recovered) -> None:
        """On rank 0: all ranks start from what was recovered."""
        self._order(_Begin(encode(recovered.resumed), recovered.asked_for))

    def stop(self, why: str) -> None:
        """On rank 0: there is nothing to start from, or nobody may."""
        self._order(_Stop(why))

    # -- the others ---------------------------------------------------------------------------

    def follow(self) -> Recovered:
        """On every other rank: do what rank 0 says, until all start.

        Raises
        ------
        AttemptFailedError
            Rank 0 says that the attempt does not start.
        StoreError
            Rank 0 says nothing in time.
        """
        opened: ShardedCheckpoint | None = None
        while True:
            order = self._next_order()
            if isinstance(order, _Stop):
                raise AttemptFailedError(f"rank 0 does not start: {order.why}")
            if isinstance(order, _Begin):
                return self._recovered(order, opened)
            opened = None  # the memory of one that was not whole
            record = decode(order.record, CommitRecord, path="rank 0's word")
            opened, own = self._loaded(record)
            self._reports(own)

    def _recovered(self, order: _Begin, opened: ShardedCheckpoint | None) -> Recovered:
        resumed = decode(order.resumed, ResumedRecord, path="rank 0's word")
        start = opened if resumed.checkpoint is not None else None
        assert resumed.checkpoint == (start.record.id if start else None)
        return Recovered(start, resumed, Lineage(tuple(resumed.lineage)), order.asked_for)

    # -- both ---------------------------------------------------------------------------------

    def _loaded(self, record: CommitRecord) -> tuple[ShardedCheckpoint | None, _Loaded]:
        rank, world_size = self._agreement.rank, self._agreement.world_size
        try:
            opened = open_sharded(
                self._store, self._layout, record, rank=rank, world_size=world_size
            )
            opened.preload()
            opened.verify_rest()
        except CorruptCheckpointError as error:
            return None, _Loaded("corrupt", str(error))
        except CkptTasksError as error:
            return None, _Loaded("failed", str(error))
        return opened, _Loaded("well")

    def _order(self, order: _Load | _Begin | _Stop) -> None:
        self._number += 1
        self._agreement.from_rank_0(f"recover/{self._number}", msgspec.msgpack.encode(order))

    def _next_order(self) -> _Load | _Begin | _Stop:
        self._number += 1
        data = self._agreement.from_rank_0(f"recover/{self._number}", seconds=self._seconds)
        order: _Load | _Begin | _Stop = msgspec.msgpack.decode(data, type=_Load | _Begin | _Stop)
        return order

    def _reports(self, own: _Loaded) -> list[_Loaded]:
        """How it went on every rank."""
        reports = self._agreement.tell_all(
            f"recover/{self._number}", msgspec.msgpack.encode(own), seconds=self._seconds
        )
        if reports is None:
            raise StoreError(f"not every rank has loaded in {self._seconds:.0f} s")
        return [msgspec.msgpack.decode(report, type=_Loaded) for report in reports]
