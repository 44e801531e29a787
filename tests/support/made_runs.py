"""Runs whose attempts and checkpoints are made one by one, without torch, by the real code."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from ckpt_tasks.checkpointer.arena import Arena
from ckpt_tasks.checkpointer.checkpointer import Checkpointer, SaveRequest
from ckpt_tasks.checkpointer.drain import InlineDrain
from ckpt_tasks.checkpointer.image import plan_image
from ckpt_tasks.checkpointer.job import JobRunner
from ckpt_tasks.checkpointer.marks import write_completed
from ckpt_tasks.checkpointer.reader import read_commit, read_index
from ckpt_tasks.checkpointer.writer import WrittenRank, write_rank
from ckpt_tasks.events import EventSink, discard_event
from ckpt_tasks.fencing.claim import Attempt, ClaimRequest, claim_attempt, open_run
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.fencing.process import this_process
from ckpt_tasks.format.codec import encode
from ckpt_tasks.format.digest import digest
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import (
    AttemptClaim,
    CommitRecord,
    CompletedRecord,
    Failure,
    Heartbeat,
    Process,
    RowBlocks,
    SharedTensor,
    now,
)
from ckpt_tasks.recovery.recover import Recovered, recover
from ckpt_tasks.registry.base import Registration, Registry
from ckpt_tasks.store.base import Store
from ckpt_tasks.store.memory import MemoryStore
from ckpt_tasks.testing import WrapperStore
from ckpt_tasks.testing.wrappers import Operation
from ckpt_tasks.types import CheckpointId, Position, SaveDecision

_roots = itertools.count(1)


def memory_store() -> MemoryStore:
    """An empty store that no other test sees."""
    return MemoryStore(f"made-runs-{next(_roots)}")


@dataclass(frozen=True)
class Tensor:
    """A tensor by its bytes."""

    item: str
    key: str
    data: bytes
    dtype: str = "U8"
    extents: tuple[int, ...] | None = None
    is_block: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.data),) if self.extents is None else self.extents


@dataclass(frozen=True)
class State:
    """Trees, and the tensors that they refer to."""

    trees: Mapping[str, Any] = field(default_factory=dict)
    tensors: Sequence[Tensor] = ()
    nonfinite: Sequence[str] = ()
    row_blocks: Sequence[RowBlocks] = ()
    shared: Sequence[SharedTensor] = ()

    def copy_into(self, buffer: memoryview, offsets: Sequence[int]) -> None:
        for tensor, offset in zip(self.tensors, offsets, strict=True):
            buffer[offset : offset + len(tensor.data)] = tensor.data

    def finish_copy(self, buffer: memoryview, offsets: Sequence[int]) -> float:
        return 0.0

    def find_nonfinite(self, buffer: memoryview, offsets: Sequence[int]) -> list[str]:
        return list(self.nonfinite)


def small_state(value: int = 0) -> State:
    """Two items, one of them with a tensor; another `value` is another state."""
    weight = Tensor("model", "weight", bytes([value]))
    return State({"model": {}, "loop": {"best": value}}, [weight])


def write_state(
    store: Store, layout: RunLayout, state: State, *, write_id: str, **how: Any
) -> WrittenRank:
    """Write a state as a checkpointer does, without a commit."""
    image = plan_image(state.tensors)
    memory = Arena().reserve(image.size)
    image.fill(memory, state)
    return write_rank(
        store,
        layout,
        image,
        memory,
        state.trees,
        write_id=write_id,
        row_blocks=state.row_blocks,
        **how,
    )


def save_request(step: int, **changes: Any) -> SaveRequest:
    """A save at the end of an epoch."""
    request = SaveRequest(
        position=Position(step=step, phase="epoch_done"),
        decision=SaveDecision("epoch", "every epoch"),
    )
    return msgspec.structs.replace(request, **changes)


def claim_request(invocation: str = "flow-run-1", **changes: Any) -> ClaimRequest:
    """What an invocation asks for."""
    request = ClaimRequest(invocation=invocation, entrypoint="toy:train", hyperparameters={})
    return msgspec.structs.replace(request, **changes)


@dataclass(frozen=True)
class MadeAttempt:
    """An attempt that has recovered."""

    attempt: Attempt
    recovered: Recovered
    checkpointer: Checkpointer

    @property
    def number(self) -> int:
        return self.attempt.number

    @property
    def start(self) -> str | None:
        """Id of the checkpoint that it started from."""
        return self.recovered.resumed.checkpoint

    def save(
        self,
        step: int,
        state: State | None = None,
        *,
        nonfinite: Sequence[str] = (),
        **request: Any,
    ) -> CheckpointId:
        """Commit a checkpoint, with parameters that are `nonfinite`; returns its id."""
        state = replace(state or small_state(), nonfinite=nonfinite)
        record = self.checkpointer.save(state, save_request(step, **request))
        return record.checkpoint

    def commit(self, step: int, *, epoch: int = 0, data: bytes = b"weights" * 100) -> str:
        """A checkpoint with a metric, at the end of an epoch; returns its id as people write it."""
        state = State({"model": {"weight": 0}}, [Tensor("model", "weight", data)])
        position = Position(epoch=epoch, step=step, phase="epoch_done")
        return str(self.save(step, state, position=position, metrics={"loss": 0.5}))


class MadeRun:
    """A run in a store of its own in memory, unless `store` says where."""

    def __init__(self, store: Store | None = None, name: str = "digits") -> None:
        self.store = store or memory_store()
        self.name = name
        self.layout = RunLayout(name)
        self.identity = open_run(self.store, self.layout, created_by="a test")

    def claim(self, invocation: str = "flow-run-1", **request: Any) -> Attempt:
        """Take the next number; this process may do so again and again."""
        asked = claim_request(invocation, **request)
        return claim_attempt(self.store, self.layout, self.identity, asked)

    def begin(
        self,
        invocation: str = "flow-run-1",
        *,
        on_event: EventSink = discard_event,
        through: Store | None = None,
        **request: Any,
    ) -> MadeAttempt:
        """Claim and recover; from then on the attempt reads and writes `through` that store."""
        attempt = self.claim(invocation, without_commit=1000, **request)
        store = through or self.store
        recovered = recover(store, self.layout, self.identity, attempt, on_event=on_event)
        return MadeAttempt(attempt, recovered, self.checkpointer(store, attempt, recovered))

    def put_claim(
        self, number: int, *, invocation: str = "flow-run-1", process: Process | None = None
    ) -> None:
        """The claim of an attempt that another process executes."""
        claim = AttemptClaim(
            uid=self.identity.uid,
            attempt=number,
            claim_id=f"claim-{number}",
            invocation=invocation,
            process=process or elsewhere(),
            claimed_at=now(),
            entrypoint="toy:train",
            hyperparameters={},
        )
        self.store.create(self.layout.attempt(number), encode(claim))

    def fail(self, attempt: int, kind: str = "ValueError: bad", *, step: int) -> None:
        """The last heartbeat of an attempt whose training failed."""
        beat = Heartbeat(
            attempt=attempt, beat=1, at=now(), ended=True, failure=Failure(kind=kind, step=step)
        )
        self.store.put(self.layout.heartbeat(attempt), encode(beat))

    def record(self, checkpoint: CheckpointId) -> CommitRecord:
        return read_commit(self.store, self.layout, checkpoint)

    def tensors_path(self, checkpoint: CheckpointId) -> str:
        """Path of the checkpoint's first tensor file."""
        index = read_index(self.store, self.layout, self.record(checkpoint).indexes[0])
        return self.layout.in_run(index.files[0].path)

    def index_path(self, checkpoint: CheckpointId) -> str:
        return self.layout.in_run(self.record(checkpoint).indexes[0].path)

    def complete(self, checkpoint: str) -> None:
        """Write the completion marker, as the attempt that made the checkpoint does."""
        record = self.record(CheckpointId.parse(checkpoint))
        completed = CompletedRecord(
            uid=self.identity.uid,
            attempt=record.checkpoint.attempt,
            checkpoint=checkpoint,
            position=record.position,
            completed_at=now(),
        )
        write_completed(self.store, self.layout, completed)

    def register(self, registry: Registry, checkpoint: str) -> Registration:
        """Make a committed checkpoint known in an opened registry."""
        path = self.layout.commit(CheckpointId.parse(checkpoint))
        uri = f"{self.store.url}/{path}"
        record = self.record(CheckpointId.parse(checkpoint))
        return registry.register(record, uri=uri, manifest=self.store.read(path))

    def damage_tensors(self, checkpoint: str) -> None:
        """Flip one bit in the checkpoint's tensor file."""
        self.damage(self.tensors_path(CheckpointId.parse(checkpoint)))

    def damage(self, path: str, *, position: int = -1) -> None:
        """Flip one bit of an object."""
        content = bytearray(self.store.read(path))
        content[position] ^= 1
        self.store.put(path, bytes(content))

    def make_later_version(self, checkpoint: CheckpointId) -> None:
        """Have the checkpoint's record need a feature that this version does not know."""
        path = self.layout.commit(checkpoint)
        record = {**msgspec.json.decode(self.store.read(path)), "required_features": ["teleport"]}
        del record["checksum"]
        body = msgspec.json.encode(record).removesuffix(b"}")
        self.store.put(path, body + b',\n "checksum": "%s"\n}\n' % digest(body).encode("ascii"))

    def contents(self) -> dict[str, bytes]:
        """Every object of the store, by path."""
        return {info.path: self.store.read(info.path) for info in self.store.list_objects("")}

    def runner(self, store: Store, attempt: Attempt) -> JobRunner:
        """Writes every byte of every checkpoint, so that no two share a file."""
        fence = Fence(store, self.layout, attempt.number)
        return JobRunner(store, self.layout, fence, incremental=False)

    def checkpointer(self, store: Store, attempt: Attempt, recovered: Recovered) -> Checkpointer:
        """Saves of a recovered attempt into `store`."""
        return Checkpointer(
            InlineDrain(self.runner(store, attempt)),
            self.identity,
            attempt.number,
            recovered.lineage,
            hyperparameters={"lr": 0.1},
            environment={"python": "3"},
        )


def elsewhere(pid: int = 4711) -> Process:
    """A process of another machine, of which nothing can be known from here."""
    return msgspec.structs.replace(this_process(), host="elsewhere", pid=pid)


class HookedStore(WrapperStore):
    """Calls a function before each operation, which may raise.

    Parameters
    ----------
    before
        Called with the operation and its path.
    """

    def __init__(self, store: Store, before: Callable[[Operation, str], None]) -> None:
        super().__init__(store)
        self._before = before

    def _run(self, operation: Operation, path: str, call: Callable[[], Any]) -> Any:
        self._before(operation, path)
        return call()
