"""One event of each kind that Prefect is told. Run as a script, it tells them, as a flow does.

``python told_events.py UID``: the events of a training run with that uid, in a process of its own,
which sends the last of them before it ends.
"""

from __future__ import annotations

import sys

from ckpt_tasks.events import (
    AttemptClaimed,
    AttemptResumed,
    CheckpointCommitted,
    CheckpointQuarantined,
    CheckpointRegistered,
    Event,
    MetricsReplayed,
    RegistryLinked,
    SaveFailed,
)
from ckpt_tasks.replay import Replay
from ckpt_tasks.types import Position

CHECKPOINT = "step-00000003-a2-s1"
POSITION = Position(epoch=0, step=3)

TOLD: dict[str, Event] = {
    "attempt.resumed": AttemptResumed(
        attempt=2, checkpoint=CHECKPOINT, position=POSITION, why="newest", lost_steps=4
    ),
    "attempt.replayed": MetricsReplayed(run="toy", attempt=2, replay=Replay(steps=37, values=74)),
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
        run="toy", checkpoint=CHECKPOINT, why="no space left", unprotected=12.5
    ),
}


def main(uid: str) -> None:
    """Tell them all."""
    from ckpt_tasks.integrations.prefect.events import EventPublisher

    publish = EventPublisher("toy")
    publish(AttemptClaimed(run="toy", uid=uid, attempt=2, invocation="i", pid=1))
    publish(RegistryLinked(tracking_uri="http://m", experiment_id="1", run_id="r1", links={}))
    for event in TOLD.values():
        publish(event)


if __name__ == "__main__":
    main(sys.argv[1])
