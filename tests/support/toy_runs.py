"""The toy training as tests of faults ask for it, and what its end is compared with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ckpt_tasks.config import AttemptConfig, CheckpointConfig, ScheduleConfig, StoreConfig
from ckpt_tasks.training.spec import TrainSpec

EPOCHS = 3
STEPS = EPOCHS * 8
SCHEDULE = ScheduleConfig(every_steps=5, every_epochs=1)
ATTEMPT = AttemptConfig(without_commit=50)


def toy_spec(root: Path | str, **changes: object) -> TrainSpec:
    """The toy training in a store at `root`."""
    fields: dict[str, object] = {
        "entrypoint": "support.toy_training:train",
        "run": "toy",
        "params": {"epochs": EPOCHS},
        "config": CheckpointConfig(
            store=StoreConfig(url=str(root)), schedule=SCHEDULE, attempt=ATTEMPT
        ),
        "invocation": "flow-run-1",
    }
    return TrainSpec(**{**fields, **changes})  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Digest:
    """The file into which the toy writes the digest of its final state."""

    path: Path

    @property
    def environment(self) -> dict[str, str]:
        """Tells the toy to write it."""
        return {"TOY_DIGEST": str(self.path)}

    def read(self) -> str:
        return self.path.read_text("ascii")
