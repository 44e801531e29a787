"""Runs in a store, made by the real claim, write and commit, without torch or a trainer."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckpt_tasks.checkpointer.commit import commit, new_write_id
from ckpt_tasks.checkpointer.marks import write_completed
from ckpt_tasks.checkpointer.writer import write_rank
from ckpt_tasks.fencing.claim import Attempt, ClaimRequest, claim_attempt, open_run
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.format.codec import decode
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord, CompletedRecord, LineageEntry, now
from ckpt_tasks.recovery.recover import Recovered, recover
from ckpt_tasks.registry.base import Registration, Registry
from ckpt_tasks.store import Store
from ckpt_tasks.types import CheckpointId, Position


@dataclass
class _Tensor:
    item: str
    key: str
    data: bytes
    dtype: str = "U8"

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.data),)

    def buffer(self) -> memoryview:
        return memoryview(self.data)


@dataclass
class _State:
    trees: Mapping[str, Any]
    tensors: list[_Tensor] = field(default_factory=list)


class StoredRun:
    """A training run whose attempts and checkpoints a test makes one by one."""

    def __init__(self, store: Store, run: str) -> None:
        self.store = store
        self.layout = RunLayout(run)
        self.identity = open_run(store, self.layout, created_by="a test")
        self.attempt: Attempt | None = None
        self.recovered: Recovered | None = None
        self._sequence = 0

    def begin_attempt(self, *, invocation: str = "flow-run-1", resume: str = "auto") -> int:
        """Claim, choose and record what it resumes from; returns the attempt's number."""
        request = ClaimRequest(
            invocation=invocation,
            entrypoint="toy:train",
            hyperparameters={"lr": 0.1},
            resume=resume,
            takeover=True,
        )
        self.attempt = claim_attempt(self.store, self.layout, self.identity, request)
        self.recovered = recover(self.store, self.layout, self.identity, self.attempt)
        self._sequence = 0
        return self.attempt.number

    def commit(self, step: int, *, epoch: int = 0, data: bytes = b"weights" * 100) -> str:
        """Commit a checkpoint of the current attempt; returns its id."""
        assert self.attempt is not None
        assert self.recovered is not None
        self._sequence += 1
        number = self.attempt.number
        checkpoint = CheckpointId(step, number, self._sequence)
        write_id = new_write_id(number, self._sequence, uuid.uuid4().hex[:8])
        state = _State({"model": {"weight": 0}}, [_Tensor("model", "weight", data)])
        written = write_rank(self.store, self.layout, state, write_id=write_id)
        resumed = self.recovered.resumed.checkpoint
        record = CommitRecord(
            uid=self.identity.uid,
            id=str(checkpoint),
            write_id=write_id,
            position=Position(epoch=epoch, step=step, phase="epoch_done"),
            lineage=[LineageEntry(attempt=number, resumed_from=resumed)],
            hyperparameters={"lr": 0.1},
            metrics={"loss": 0.5},
            trigger="epoch",
            reason="every epoch",
            timings={},
            environment={},
            world_size=1,
            size=written.size,
            indexes=[written.ref],
            created_at=now(),
        )
        fence = Fence(self.store, self.layout, number)
        commit(self.store, self.layout, fence, record, [written.index])
        return record.id

    def complete(self, checkpoint: str) -> None:
        """Write the completion marker."""
        assert self.attempt is not None
        parsed = CheckpointId.parse(checkpoint)
        write_completed(
            self.store,
            self.layout,
            CompletedRecord(
                uid=self.identity.uid,
                attempt=self.attempt.number,
                checkpoint=checkpoint,
                position=Position(step=parsed.step, phase="epoch_done"),
                completed_at=now(),
            ),
        )

    def damage(self, checkpoint: str) -> None:
        """Flip one byte in the checkpoint's tensor file."""
        parsed = CheckpointId.parse(checkpoint)
        prefix = f"{self.layout.data}a{parsed.attempt:04d}-s{parsed.sequence:04d}-"
        (path,) = (
            info.path
            for info in self.store.list_objects(self.layout.data)
            if info.path.startswith(prefix) and info.path.endswith(".safetensors")
        )
        content = bytearray(self.store.read(path))
        content[-1] ^= 1
        self.store.delete(path)
        self.store.write(path, [bytes(content)], len(content))

    def register(self, registry: Registry, checkpoint: str) -> Registration:
        """Make a committed checkpoint known in an opened registry."""
        path = self.layout.commit(CheckpointId.parse(checkpoint))
        data = self.store.read(path)
        record = decode(data, CommitRecord, path=path)
        return registry.register(record, uri=f"{self.store.url}/{path}", manifest=data)
