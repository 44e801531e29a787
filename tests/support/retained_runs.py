"""Runs whose checkpoints share bytes and grow old, for tests of retention."""

from __future__ import annotations

from support.aged_store import AgedStore
from support.made_runs import MadeRun, State, Tensor, memory_store

from ckpt_tasks.checkpointer.catalog import view_run
from ckpt_tasks.checkpointer.checkpointer import Checkpointer
from ckpt_tasks.checkpointer.drain import InlineDrain
from ckpt_tasks.checkpointer.job import JobRunner
from ckpt_tasks.checkpointer.verify import verify_checkpoint
from ckpt_tasks.config import RetentionConfig
from ckpt_tasks.fencing.claim import Attempt
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.recovery.recover import Recovered
from ckpt_tasks.registry.base import Registry
from ckpt_tasks.retention import CollectReport, RetentionPlan, collect, expire
from ckpt_tasks.retention.references import files_of
from ckpt_tasks.store.base import Store
from ckpt_tasks.types import CheckpointId

GRACE = 3600.0


def state_of(step: int, *, frozen: int = 0) -> State:
    """A tensor that stays as it is until `frozen` changes, and one that is new at each step."""
    body = Tensor("model", "body", bytes([frozen]) * 9000)
    head = Tensor("model", "head", step.to_bytes(4, "big") * 30)
    return State({"model": {}}, [body, head])


class RetainedRun(MadeRun):
    """A run whose checkpoints refer to what earlier ones hold."""

    def __init__(self, store: Store | None = None) -> None:
        self.aged = AgedStore(store or memory_store())
        super().__init__(self.aged)

    def checkpointer(self, store: Store, attempt: Attempt, recovered: Recovered) -> Checkpointer:
        start = recovered.checkpoint
        runner = JobRunner(
            store,
            self.layout,
            Fence(store, self.layout, attempt.number),
            base=start.record.indexes[0] if start is not None else None,
        )
        return Checkpointer(
            InlineDrain(runner),
            self.identity,
            attempt.number,
            recovered.lineage,
            hyperparameters={},
            environment={},
        )

    def expire(
        self, *, registry: Registry | None = None, through: Store | None = None, **rules: object
    ) -> RetentionPlan:
        config = RetentionConfig(**rules)  # type: ignore[arg-type]
        return expire(through or self.store, self.name, config, by="a test", registry=registry)

    def collect(
        self, *, registry: Registry | None = None, through: Store | None = None
    ) -> CollectReport:
        store = through or self.store
        return collect(
            store,
            self.name,
            grace=GRACE,
            by="a test",
            registry=registry,
            uptime=self.aged.uptime,
        )

    def expire_and_collect(self, **rules: object) -> CollectReport:
        """Retention, with the grace passed."""
        self.expire(**rules)
        self.aged.age(2 * GRACE)
        return self.collect()

    def left(self) -> list[CheckpointId]:
        """Checkpoints that have a record, oldest first."""
        ids = [CheckpointId.parse(c.id) for c in view_run(self.store, self.name).checkpoints]
        return sorted(ids, key=lambda c: (c.attempt, c.sequence))

    def paths(self, *folders: str) -> set[str]:
        """Objects in folders of the run."""
        prefixes = tuple(f"{self.layout.folder}{folder}/" for folder in folders)
        found = (info.path for info in self.store.list_objects(self.layout.folder))
        return {path for path in found if path.startswith(prefixes)}

    def check_whole(self) -> None:
        """Every checkpoint is whole, and there are no bytes that none of them needs."""
        needed: set[str] = set()
        for checkpoint in self.left():
            report = verify_checkpoint(self.store, self.name, checkpoint)
            assert report.ok, report
            needed |= files_of(self.store, self.layout, self.record(checkpoint)).keys()
        assert self.paths("data") == needed
