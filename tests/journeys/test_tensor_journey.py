"""One tensor's way to storage and back, stage by stage.

To storage: `training` asks `schedule`; `state` collects; `checkpointer` digests and writes; the
commit lies between two looks at the fence. Back: `recovery` reads the record, the index and the
file, each checked against the digest that the one before it names; then `state` restores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tasks import TrainingRun
from ckpt_tasks.checkpointer import reader, windows, writer
from ckpt_tasks.checkpointer.catalog import list_checkpoints
from ckpt_tasks.checkpointer.reader import read_commit, read_index
from ckpt_tasks.config import CheckpointConfig, ScheduleConfig, StoreConfig
from ckpt_tasks.events import (
    AttemptResumed,
    CheckpointCommitted,
    Event,
    SaveStarted,
)
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.schedule.policy import SaveContext, SaveDecisionPolicy, policy_from_config
from ckpt_tasks.store import Store, open_store
from ckpt_tasks.testing import WrapperStore
from ckpt_tasks.testing.wrappers import Operation
from ckpt_tasks.training import attempt as attempt_module
from ckpt_tasks.training.attempt import AttemptRunner
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import SaveDecision

VALUES = [-0.0, 1e-45, math.pi, -1e38]
"""Such as change when anything rounds, flushes or normalises them."""

STAGES_OF_OPERATIONS: tuple[tuple[Operation, str, str], ...] = (
    ("create", "/attempts/0002.json", "attempt claimed"),
    ("exists", "/attempts/", "fence asked"),
    ("write", "holder.rank0000.safetensors", "file written"),
    ("write", "rank0000.index.json", "index written"),
    ("create", "/commits/", "commit record created"),
    ("read", "/commits/", "commit record read"),
    ("read", "rank0000.index.json", "index read"),
    ("read_range", "holder.rank0000.safetensors", "header read"),
    ("read_into", "holder.rank0000.safetensors", "file read"),
    ("create", ".resumed.json", "start recorded"),
)
STAGES_OF_EVENTS: dict[type[Event], str] = {
    SaveStarted: "event: save started",
    CheckpointCommitted: "event: committed",
    AttemptResumed: "event: resumed",
}


class Journey:
    """The stages that the tensor passed, in order."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def pass_event(self, event: Event) -> None:
        """An event sink."""
        stage = STAGES_OF_EVENTS.get(type(event))
        if stage is not None:
            self.stages.append(stage)

    def between(self, first: str, last: str) -> list[str]:
        """The stages from the last `first` before the first `last`, up to that."""
        stop = self.stages.index(last)
        start = max(n for n in range(stop) if self.stages[n] == first)
        return self.stages[start : stop + 1]


class RecordingStore(WrapperStore):
    """Notes each operation that is a stage, once it is done."""

    def __init__(self, store: Store, journey: Journey) -> None:
        super().__init__(store)
        self._journey = journey

    def _run(self, operation: Operation, path: str, call: Callable[[], Any]) -> Any:
        answer = call()
        for kind, part, stage in STAGES_OF_OPERATIONS:
            if operation == kind and part in path:
                self._journey.stages.append(stage)
        return answer


class Holder:
    """The object that holds the tensor, as a model does."""

    def __init__(self, journey: Journey, values: Iterable[float]) -> None:
        self._journey = journey
        self.value = torch.tensor(list(values))

    def state_dict(self) -> dict[str, torch.Tensor]:
        self._journey.stages.append("state captured")
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.value = state["value"]
        self._journey.stages.append("value restored")


class RecordingPolicy:
    """Notes when the real policy is asked."""

    def __init__(self, policy: SaveDecisionPolicy, journey: Journey) -> None:
        self._policy = policy
        self._journey = journey

    def should_save(self, context: SaveContext) -> SaveDecision | None:
        self._journey.stages.append("schedule asked")
        return self._policy.should_save(context)


@pytest.fixture
def journey(monkeypatch: pytest.MonkeyPatch) -> Journey:
    """Watches an attempt in this process at its seams; every part is the real one."""
    journey = Journey()
    tensor = torch.tensor(VALUES).numpy().tobytes()

    def watched(module: Any, stage: str) -> None:
        digest = module.digest

        def watch(data: Any) -> str:
            if bytes(data) == tensor:
                journey.stages.append(stage)
            result: str = digest(data)
            return result

        monkeypatch.setattr(module, "digest", watch)

    def watch_index(data: bytes) -> str:
        journey.stages.append("index verified")
        return index_digest(data)

    index_digest = reader.index_digest
    watched(writer, "chunk digested")
    watched(windows, "chunk verified")
    monkeypatch.setattr(reader, "index_digest", watch_index)
    monkeypatch.setattr(
        attempt_module,
        "open_store",
        lambda *args, **kwargs: RecordingStore(open_store(*args, **kwargs), journey),
    )
    monkeypatch.setattr(
        attempt_module,
        "policy_from_config",
        lambda config: RecordingPolicy(policy_from_config(config), journey),
    )
    return journey


@pytest.fixture
def spec(tmp_path: Path) -> TrainSpec:
    """A training that saves after every epoch."""
    return TrainSpec(
        entrypoint="test:train",
        run="journey",
        config=CheckpointConfig(
            store=StoreConfig(url=str(tmp_path / "store")), schedule=ScheduleConfig(every_epochs=1)
        ),
        invocation="flow-run-1",
    )


def save_once(spec: TrainSpec, journey: Journey) -> None:
    """An attempt that commits one checkpoint and fails."""

    def train(run: TrainingRun) -> None:
        run.track(holder=Holder(journey, VALUES))
        for epoch in run.epochs(2):
            if epoch == 1:
                raise RuntimeError("the GPU fell off the bus")

    with pytest.raises(RuntimeError, match="fell off the bus"):
        AttemptRunner(spec, journey.pass_event).execute(train)


def test_way_to_storage(journey: Journey, spec: TrainSpec) -> None:
    """Asked, captured, digested, written, indexed, fenced, committed, fenced, reported."""
    save_once(spec, journey)
    assert journey.between("schedule asked", "event: committed") == [
        "schedule asked",
        "state captured",
        "event: save started",
        "fence asked",  # whether its own claim is still there
        "chunk digested",
        "file written",
        "index written",
        "fence asked",
        "commit record created",
        "fence asked",
        "event: committed",
    ]


def test_bytes_in_storage(journey: Journey, spec: TrainSpec) -> None:
    """The record names the index, the index the file and the place, and there the bytes lie."""
    save_once(spec, journey)
    layout = RunLayout(spec.run)
    with open_store(spec.config.store) as store:
        (checkpoint,) = list_checkpoints(store, layout)
        index = read_index(store, layout, read_commit(store, layout, checkpoint).indexes[0])
        (tensor,) = [
            t for t in index.tensors if "holder" in index.files[t.file].path.rpartition("/")[2]
        ]
        path = layout.in_run(index.files[tensor.file].path)
        stored = store.read_range(path, tensor.offset, tensor.offset + tensor.size)
    assert (tensor.dtype, tensor.shape) == ("F32", [len(VALUES)])
    assert stored == torch.tensor(VALUES).numpy().tobytes()


def test_way_back(journey: Journey, spec: TrainSpec) -> None:
    """Claimed, read, verified link by link, fenced, recorded, and only then restored: every bit
    as it was.
    """
    save_once(spec, journey)
    journey.stages.clear()
    holder = Holder(journey, [0.0] * len(VALUES))

    def train(run: TrainingRun) -> None:
        run.track(holder=holder)
        assert run.epoch == 0
        for _epoch in run.epochs(1):
            raise AssertionError("the epoch that was saved is not done again")

    assert AttemptRunner(spec, journey.pass_event).execute(train).done
    assert journey.between("attempt claimed", "value restored") == [
        "attempt claimed",
        "commit record read",
        "index read",
        "index verified",
        "header read",
        "file read",
        "chunk verified",
        "fence asked",
        "start recorded",
        "event: resumed",
        "state captured",  # what the object is like now, which must match what was saved
        "value restored",
    ]
    bits = torch.tensor(VALUES).view(torch.int32)
    assert torch.equal(holder.value.view(torch.int32), bits)
