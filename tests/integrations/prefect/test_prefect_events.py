from __future__ import annotations

from uuid import uuid4

import pytest
from support.prefect_runs import events
from support.prefect_server import PrefectServer, wait_until

from ckpt_tasks.events import (
    AttemptClaimed,
    AttemptResumed,
    CheckpointCommitted,
    CheckpointQuarantined,
    CheckpointRegistered,
    Event,
    RegistryLinked,
    SaveFailed,
)
from ckpt_tasks.integrations.prefect.events import EventPublisher
from ckpt_tasks.types import Position

CHECKPOINT = "step-00000003-a2-s1"
POSITION = Position(epoch=0, step=3)

TOLD: dict[str, Event] = {
    "attempt.resumed": AttemptResumed(
        attempt=2, checkpoint=CHECKPOINT, position=POSITION, why="newest", lost_steps=4
    ),
    "checkpoint.committed": CheckpointCommitted(
        checkpoint=CHECKPOINT,
        position=POSITION,
        trigger="steps",
        reason="every 3 steps",
        size=10,
        seconds=0.1,
    ),
    "checkpoint.registered": CheckpointRegistered(
        checkpoint=CHECKPOINT, registered_model="toy", version="4", model_id="m"
    ),
    "checkpoint.quarantined": CheckpointQuarantined(checkpoint=CHECKPOINT, why="digest differs"),
    "checkpoint.save-failed": SaveFailed(
        checkpoint=CHECKPOINT, why="no space left", unprotected=12.5
    ),
}


@pytest.mark.parametrize("name", TOLD)
def test_event_arrives_with_its_resource_and_what_it_is_about(
    prefect_api: PrefectServer, name: str
) -> None:
    """An automation can match each by name, resource and runs, and read all of the event."""
    uid = uuid4().hex
    publish = EventPublisher("toy")
    publish(AttemptClaimed(run="toy", uid=uid, attempt=2, invocation="i", pid=1))
    publish(RegistryLinked(tracking_uri="http://m", experiment_id="1", run_id="r1", links={}))
    publish(TOLD[name])

    run = f"ckpt_tasks.run.{uid}"
    (event,) = wait_until(
        lambda: events(prefect_api, f"ckpt_tasks.{name}", related=run), timeout=20, what=name
    )

    about = "attempt" if name.startswith("attempt") else "checkpoint"
    which = "2" if about == "attempt" else CHECKPOINT
    assert event["resource"]["prefect.resource.id"] == f"ckpt_tasks.{about}.{uid}.{which}"
    roles = {r["prefect.resource.role"]: r["prefect.resource.id"] for r in event["related"]}
    assert roles == {"training-run": run, "mlflow-run": "mlflow.run.r1"}
    told = TOLD[name]
    assert event["payload"]["run"] == "toy"
    for field in ("why", "lost_steps", "unprotected", "version", "size"):
        assert event["payload"].get(field) == getattr(told, field, None)
