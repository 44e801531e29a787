"""One wording of events, which the shell and the orchestrators share."""

from __future__ import annotations

import logging

import pytest
from support.replays import DIVERGED

from ckpt_tasks import events
from ckpt_tasks.replay import Replay
from ckpt_tasks.tasks import narrate
from ckpt_tasks.types import Position

AT = Position(epoch=1, step=10)
CHECKPOINT = "step-00000010-a1-s1"

SILENT = {
    events.MetricsLogged,
    events.Progress,
    events.RunFoundComplete,
    events.SaveStarted,
}

TOLD = [
    (
        events.AttemptClaimed(run="digits", uid="u", attempt=2, invocation="i", pid=41),
        (logging.INFO, "attempt 2 of run 'digits' has begun (pid 41)"),
    ),
    (
        events.AttemptResumed(attempt=1, checkpoint=None, position=Position(), why="the first"),
        (logging.INFO, "attempt 1 starts from the beginning: the first"),
    ),
    (
        events.AttemptResumed(attempt=2, checkpoint=CHECKPOINT, position=AT, why="newest"),
        (logging.INFO, f"attempt 2 resumed from {CHECKPOINT}, step 10 (in epoch 1): newest"),
    ),
    (
        events.CheckpointCommitted(
            checkpoint=CHECKPOINT,
            position=AT,
            trigger="steps",
            reason="every 10 steps",
            size=1500,
            seconds=0.25,
        ),
        (logging.INFO, f"saved {CHECKPOINT}, 1.5 kB, waited 0.25 s (steps: every 10 steps)"),
    ),
    (
        events.CheckpointQuarantined(checkpoint=CHECKPOINT, why="chunk 3"),
        (logging.ERROR, f"{CHECKPOINT} is damaged, quarantined: chunk 3"),
    ),
    (
        events.CheckpointRegistered(
            checkpoint=CHECKPOINT, registered_model="digits", version="4", model_id="m"
        ),
        (logging.INFO, f"registered {CHECKPOINT} as digits version 4"),
    ),
    (
        events.RegistryLinked(tracking_uri="http://h", experiment_id="1", run_id="r", links={}),
        (logging.INFO, "metrics and checkpoints go to http://h, run r"),
    ),
    (
        events.RegistryUnavailable(why="no route", queued=4),
        (logging.WARNING, "the registry has not taken all, 4 requests wait: no route"),
    ),
    (
        events.RegistryUnavailable(why="no route", queued=4, again=True),
        (logging.WARNING, "the registry has still not taken all, 4 requests wait: no route"),
    ),
    (
        events.RegistryUnavailable(why="no route", queued=4, again=True, left=54.6),
        (logging.WARNING, "still waiting for the registry, 55 s left"),
    ),
    (
        events.SaveFailed(
            run="toy", checkpoint=CHECKPOINT, why="s3://a:hunter2@b is full", unprotected=61
        ),
        (
            logging.WARNING,
            f"{CHECKPOINT} of run 'toy' was not saved, 61 s without a durable checkpoint; training "
            "goes on: s3://***@b is full",
        ),
    ),
    (
        events.SaveFailed(
            run="toy", checkpoint=CHECKPOINT, why="full", unprotected=90, failures=10
        ),
        (
            logging.WARNING,
            f"{CHECKPOINT} of run 'toy' was not saved (10 saves have failed), 90 s without a "
            "durable checkpoint; training goes on: full",
        ),
    ),
    (
        events.SaveFailed(
            run="toy", checkpoint=CHECKPOINT, why="full", unprotected=66, failures=2, again=True
        ),
        None,
    ),
    (
        events.SavesRecovered(checkpoint=CHECKPOINT, failures=12, unprotected=98.7),
        (
            logging.INFO,
            "saves succeed again, after 12 that failed and 99 s without a durable checkpoint",
        ),
    ),
    (
        events.SaveAwaited(checkpoint=CHECKPOINT, waited=40.2, left=1760),
        (
            logging.INFO,
            f"still waiting until {CHECKPOINT} is written, for 40 s so far and 1760 s more at most",
        ),
    ),
    (
        events.SaveDelayed(
            trigger="steps", reason="every 10 steps", position=AT, behind=CHECKPOINT, waits=False
        ),
        (
            logging.INFO,
            "a save is due at step 10 (in epoch 1) (steps: every 10 steps) and put off until "
            f"{CHECKPOINT} is written",
        ),
    ),
    (
        events.SaveDelayed(
            trigger="epoch", reason="every 1 epochs", position=AT, behind=CHECKPOINT, waits=True
        ),
        (
            logging.WARNING,
            "a save is due at step 10 (in epoch 1) (epoch: every 1 epochs); training waits until "
            f"{CHECKPOINT} is written",
        ),
    ),
    (
        events.MetricsReplayed(run="toy", attempt=2, replay=DIVERGED),
        (
            logging.WARNING,
            "attempt 2 of run 'toy' replayed 5 steps, 1 came out differently, first step 8 (loss: "
            "0.5, then 0.75); largest difference 0.25 (loss, step 8), relative 0.333 (loss, step "
            "8). The training is not deterministic: its state and the order of its data were "
            "restored exactly, and what it computed from them is not the same",
        ),
    ),
    (
        events.MetricsReplayed(run="toy", attempt=2, replay=Replay(steps=1, values=3)),
        (logging.INFO, "attempt 2 of run 'toy' replayed 1 step, all identical"),
    ),
    (
        events.RetentionApplied(expired=["c3"], removed=["c1", "c2"], freed=3000),
        (logging.INFO, "no longer kept: c3; removed: c1, c2 (3 kB)"),
    ),
    (events.Warned(message="data order only"), (logging.WARNING, "data order only")),
    (events.OutputLine(text="token=abc"), (logging.INFO, "token=abc")),
    (events.AttemptEnded(attempt=1, code=0, message="done"), (logging.INFO, "done")),
    (events.AttemptEnded(attempt=1, code=75, message="stopped"), (logging.INFO, "stopped")),
    (events.AttemptEnded(attempt=1, code=1, message="died"), (logging.ERROR, "died")),
]


@pytest.mark.parametrize(("event", "line"), TOLD, ids=lambda v: type(v).__name__)
def test_an_event_is_told(event: events.Event, line: tuple[int, str] | None) -> None:
    """Level and text of each event; credentials are masked in all but the user's own output."""
    assert narrate(event) == line


def test_every_event_is_thought_of() -> None:
    """An event added later is either described or known to need no line."""
    told = {type(event) for event, _ in TOLD}
    assert told | SILENT == set(events.Event.__subclasses__())
    assert not told & SILENT
