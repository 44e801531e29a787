from __future__ import annotations

import logging
import re
from uuid import uuid4

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from support.prefect_runs import artifacts, client, table
from support.prefect_server import free_port, wait_until

from ckpt_tasks.events import (
    CheckpointCommitted,
    CheckpointQuarantined,
    CheckpointRegistered,
    Progress,
)
from ckpt_tasks.integrations.prefect.artifacts import (
    ArtifactPublisher,
    KeyedArtifact,
    ProgressEstimate,
    artifact_key,
)
from ckpt_tasks.types import Position


def committed(checkpoint: str, position: Position) -> CheckpointCommitted:
    return CheckpointCommitted(
        checkpoint=checkpoint,
        position=position,
        trigger="steps",
        reason="every 3 steps",
        size=10,
        seconds=0.1,
    )


@pytest.mark.parametrize("run", ["digits-1", "Digits 1", "digits/1", "ünï", "..", "a" * 300])
def test_keys_are_valid_and_one_per_run(run: str) -> None:
    """Any run name gives a key that Prefect takes, and similar names give different keys."""
    key = artifact_key("progress", run)

    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", key)
    assert len(key) < 100
    assert key != artifact_key("progress", f"{run}.")


@pytest.mark.parametrize(
    ("positions", "percent"),
    [
        ([Position(epoch=0, step=5)], 0.0),
        ([Position(epoch=0, step=10, phase="epoch_done")], 25.0),
        ([Position(epoch=0, step=10, phase="epoch_done"), Position(epoch=1, step=15)], 37.5),
        ([Position(epoch=3, step=40, phase="epoch_done")], 100.0),
        ([Position(epoch=2, step=20)], 50.0),
    ],
)
def test_progress_follows_epochs_and_their_mean_length(
    positions: list[Position], percent: float
) -> None:
    """Whole epochs count fully; within one, steps count by the mean of the earlier ones."""
    estimate = ProgressEstimate()

    for position in positions:
        estimate.update(position, 4)

    assert estimate.percent == percent


def test_absent_server_is_told_once_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Without a server, events are still taken at once, one warning is logged, closing works."""
    absent = f"http://127.0.0.1:{free_port()}/api"
    logger = logging.getLogger("test-artifacts")
    with temporary_settings({PREFECT_API_URL: absent, PREFECT_CLIENT_MAX_RETRIES: 0}):
        publisher = ArtifactPublisher("toy", uuid4(), None, logger)
        position = Position(step=3)
        publisher(Progress(position=position, epochs=2))
        wait_until(lambda: "cannot be updated" in caplog.text, timeout=60, what="a warning")
        publisher(committed("step-00000003-a1-s1", position))
        publisher.close()

    warnings = [record for record in caplog.records if record.name == "test-artifacts"]
    assert len(warnings) == 1
    assert "training is not affected" in warnings[0].getMessage()


@pytest.mark.usefixtures("prefect_api")
def test_an_artifact_deleted_meanwhile_is_made_again() -> None:
    """Deleted in the UI, an artifact comes back with its next update, and is updated from then."""
    flow_run = uuid4()
    artifact = KeyedArtifact("markdown", "registry-toy", flow_run, None)
    with client() as api:
        artifact.publish(api, "one", "first")
        api.delete_artifact(artifacts(flow_run)["registry"][0].id)
        artifact.publish(api, "two", "second")
        artifact.publish(api, "three", "third")
    (found,) = artifacts(flow_run)["registry"]
    assert (found.data, found.description) == ("three", "third")


@pytest.mark.usefixtures("prefect_api")
def test_table_shows_each_checkpoint_with_its_newest_state() -> None:
    """Committed, registered or quarantined: one row each, newest first, known before or not."""
    flow_run = uuid4()
    publisher = ArtifactPublisher("toy", flow_run, None, logging.getLogger("test-artifacts"))
    for step in (3, 6, 9):
        publisher(committed(f"step-{step:08}-a1-s{step // 3}", Position(epoch=1, step=step)))
    publisher(
        CheckpointRegistered(
            checkpoint="step-00000006-a1-s2", registered_model="toy", version="2", model_id="m"
        )
    )
    publisher(CheckpointQuarantined(checkpoint="step-00000009-a1-s3", why="digest differs"))
    publisher(CheckpointQuarantined(checkpoint="step-00000012-a1-s4", why="no such file"))
    publisher.close()

    rows = table(artifacts(flow_run)["checkpoints"][0])
    assert [(row["step"], row["epoch"], row["state"]) for row in rows] == [
        (12, None, "quarantined: no such file"),
        (9, 1, "quarantined: digest differs"),
        (6, 1, "registered: toy v2"),
        (3, 1, "committed"),
    ]
