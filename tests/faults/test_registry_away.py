"""The registry away, its publisher killed, the trainer killed: all is published, and once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec
import pytest
from mlflow import MlflowClient
from support.attempt_forks import AttemptForks, Kill
from support.launches import TOY, Launch, launched, wait_until
from support.mlflow_proxy import Faults, Reply, mlflow_proxy
from support.mlflow_server import MlflowServer
from support.published import check_published, run_of, with_registry
from support.run_checks import check_run
from support.toy_runs import STEPS, Digest, toy_spec

from ckpt_tasks.config import AttemptConfig, ScheduleConfig
from ckpt_tasks.events import (
    AttemptResumed,
    CheckpointCommitted,
    CheckpointRegistered,
    MetricsLogged,
    MetricsReplayed,
    Progress,
    RegistryLinked,
    RegistryUnavailable,
    Warned,
)
from ckpt_tasks.training.spec import NOT_REGISTERED, TrainSpec
from ckpt_tasks.types import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED

EPOCHS = 20
"""Of the training that outlasts every outage, and is stopped then."""
DRIFTING = TOY.with_name("toy_drifting.py")


@pytest.fixture
def server(_migrated_database: Path, tmp_path: Path) -> Iterator[MlflowServer]:
    """An MLflow server that this test stops and starts; stopped at first."""
    server = MlflowServer(tmp_path / "server")
    server.folder.mkdir()
    (server.folder / "mlflow.db").write_bytes(_migrated_database.read_bytes())
    yield server
    server.stop()


@pytest.fixture
def spec(root: Path) -> TrainSpec:
    """The toy training, named by its file."""
    return toy_spec(root, entrypoint=f"{TOY}:train")


ERROR = b'{"error_code": "INTERNAL_ERROR", "message": "the database is down"}'
REPLIES = {
    "HTTP 500": (Reply(500, body=ERROR), "it answered with HTTP status 500"),
    "HTTP 503 of a gateway": (
        Reply(503, "text/html", b"<html>no backend</html>"),
        "it answered with HTTP status 503",
    ),
    "a page in place of JSON": (Reply(200, "text/html", b"<html>sign in</html>"), "sign in"),
    "an answer that is cut off": (Reply(cuts=True), "its answer was cut off"),
    "no answer": (Reply(hangs=True), "it did not answer in time"),
}
"""What a registry answers that is not well, and a part of what people are told of it."""


def test_training_goes_on_whatever_the_registry_answers(
    root: Path,
    server: MlflowServer,
    forks: AttemptForks,
    digest: Digest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Errors, pages, cut answers and none, from the start on: each is told in one line, steps are
    done meanwhile, and in the end all is there, once; training is the same, bit for bit.
    """
    spec = toy_spec(root, entrypoint=f"{TOY}:train", params={"epochs": EPOCHS})
    sparse = ScheduleConfig(every_steps=10)
    config = msgspec.structs.replace(spec.config, schedule=sparse)
    spec = msgspec.structs.replace(spec, config=config)
    alone = Digest(tmp_path / "alone")
    plain = toy_spec(tmp_path / "plain", params={"epochs": EPOCHS})
    assert forks.run(plain, environment=alone.environment).outcome.code == EXIT_DONE
    for name, value in digest.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.3")
    server.start()
    with mlflow_proxy(server.uri) as (uri, faults):
        faults.reply = REPLIES["HTTP 500"][0]
        with launched(with_registry(spec, uri)) as attempt:
            for reply, says in REPLIES.values():
                _survive(attempt, faults, reply, says)
            attempt.request_stop()
            assert attempt.outcome().code == EXIT_STOPPED, attempt.output
        monkeypatch.setenv("TOY_STEP_SECONDS", "0")
        with launched(with_registry(spec, uri)) as again:
            again.wait_for(RegistryLinked)
            faults.reply = REPLIES["HTTP 503 of a gateway"][0]
            again.wait_for(RegistryUnavailable, lambda event: event.left is not None)
            faults.reply = None
            assert again.outcome().code == EXIT_DONE, again.output
    assert digest.read() == alone.read()
    check_published(spec, server.backend_uri, steps=8 * EPOCHS)


def _survive(attempt: Launch, faults: Faults, reply: Reply, says: str) -> None:
    """One outage, from the first line about it to the end of it; training pauses behind it."""
    told = len(attempt.of(RegistryUnavailable))
    faults.reply = reply
    wait_until(lambda: len(attempt.of(RegistryUnavailable)) > told, f"a word about {says!r}")
    event = attempt.of(RegistryUnavailable)[told]
    assert says in event.why
    assert "\n" not in event.why
    assert len(event.why) < 300
    count = len(attempt.of(CheckpointCommitted))
    wait_until(lambda: len(attempt.of(CheckpointCommitted)) > count, "a checkpoint meanwhile")
    attempt.trainer.suspend()
    faults.reply = None
    committed = {event.checkpoint for event in attempt.of(CheckpointCommitted)}
    wait_until(lambda: committed <= _registered(attempt), "the registration of what was missing")
    attempt.trainer.resume()


def _registered(attempt: Launch) -> set[str]:
    return {event.checkpoint for event in attempt.of(CheckpointRegistered)}


def test_a_registry_that_stays_away_is_told_shortly(
    spec: TrainSpec, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its host and the cause once, in a few words; then, at growing intervals, how long the end
    still waits; and at last what is missing.
    """
    attempts = AttemptConfig(drain=9.0)
    short = msgspec.structs.replace(
        spec, config=msgspec.structs.replace(spec.config, attempt=attempts)
    )
    with launched(with_registry(short, server.uri)) as attempt:
        assert attempt.outcome().code == EXIT_DONE, attempt.output
    first, *later = attempt.of(RegistryUnavailable)
    assert not first.again
    assert first.why.startswith(f"MLflow at {server.uri} did not ")
    assert first.why.endswith(": Connection refused")
    assert len(first.why) < 150
    draining = [event for event in later if event.left is not None]
    assert 1 <= len(draining) <= 3
    assert all(event.again for event in later)
    (closing,) = [event.message for event in attempt.of(Warned) if NOT_REGISTERED in event.message]
    assert "within 9 s" in closing


def test_a_second_attempt_publishes_what_the_first_could_not(
    spec: TrainSpec, forks: AttemptForks, mlflow_database: str
) -> None:
    """Checkpoints keep their metrics, so that an attempt without a registry leaves no gap."""
    assert forks.run(spec, kill=Kill(step=13)).killed
    with launched(with_registry(spec, mlflow_database)) as attempt:
        outcome = attempt.outcome()
        assert outcome.code == EXIT_DONE, attempt.output
    check_published(spec, mlflow_database)


def test_a_complete_run_is_published_late(
    spec: TrainSpec, forks: AttemptForks, mlflow_database: str
) -> None:
    """Started once more, a complete run trains nothing, and is registered as what it is."""
    assert forks.run(spec).outcome.code == EXIT_DONE
    with launched(with_registry(spec, mlflow_database)) as attempt:
        outcome = attempt.outcome()
        assert outcome.code == EXIT_DONE, attempt.output
    assert "complete already" in outcome.message
    check_published(spec, mlflow_database)


def test_one_run_and_every_step_once_after_kills(
    spec: TrainSpec,
    mlflow_database: str,
    digest: Digest,
    expected_digest: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trainer killed twice, registrar once: one run, all steps, no divergence, same end."""
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.5")
    for name, value in digest.environment.items():
        monkeypatch.setenv(name, value)
    registering = with_registry(spec, mlflow_database)
    with launched(registering) as first:
        first.wait_for(CheckpointRegistered)
        first.registrar.kill()
        _kill_beyond(first, 8)
    with launched(registering) as second:
        resumed = second.wait_for(AttemptResumed)
        assert resumed.checkpoint == first.of(CheckpointCommitted)[-1].checkpoint
        assert resumed.lost_steps >= 0
        _kill_beyond(second, 17)
    monkeypatch.setenv("TOY_STEP_SECONDS", "0")
    with launched(registering) as third:
        outcome = third.outcome()
        assert outcome.code == EXIT_DONE, third.output
    assert digest.read() == expected_digest
    told = [*second.of(MetricsReplayed), *third.of(MetricsReplayed)]
    assert told
    assert {event.replay.has_diverged for event in told} == {False}
    assert run_of(mlflow_database).data.tags["ckpt.replay"].startswith("identical: ")
    check_run(spec, steps=STEPS)
    check_published(spec, mlflow_database)


def _kill_beyond(attempt: Launch, step: int) -> None:
    attempt.wait_for(Progress, lambda event: event.position.step > step)
    attempt.trainer.kill()
    assert attempt.outcome().code == EXIT_FAILED


@pytest.mark.parametrize("metrics", ["live", "committed"])
def test_steps_that_came_out_differently_are_counted(
    spec: TrainSpec,
    mlflow_database: str,
    monkeypatch: pytest.MonkeyPatch,
    metrics: Literal["live", "committed"],
) -> None:
    """Steps that a training which is not deterministic does again are compared, and told. Live,
    their first values stand in MLflow; the replay's where only committed ones are sent.
    """
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.5")
    schedule = ScheduleConfig(every_epochs=1)
    config = msgspec.structs.replace(spec.config, schedule=schedule)
    drifting = msgspec.structs.replace(
        spec, entrypoint=f"{DRIFTING}:train", config=config, params={"epochs": 2}
    )
    registering = with_registry(drifting, mlflow_database, metrics=metrics)
    with launched(registering) as first:
        first.wait_for(Progress, lambda event: event.position.step % 8 >= 2)
        first.trainer.kill()
        assert first.outcome().code == EXIT_FAILED
    lost = max(event.position.step for event in first.of(Progress))
    lost -= max((event.position.step for event in first.of(CheckpointCommitted)), default=0)
    assert lost
    monkeypatch.setenv("TOY_STEP_SECONDS", "0")
    with launched(registering) as second:
        outcome = second.outcome()
        assert outcome.code == EXIT_DONE, second.output
    assert second.wait_for(AttemptResumed).lost_steps == lost
    (replayed,) = second.of(MetricsReplayed)
    found = replayed.replay
    assert (found.steps, found.diverged_steps, found.diverged_values) == (lost, lost, lost)
    assert found.values == 2 * lost
    assert found.keys == {"loss": lost}
    before, after = _losses(first), _losses(second)
    diverged = [step for step in after if step in before]
    assert found.first is not None
    assert (found.first.step, found.first.first, found.first.replayed) == (
        *(diverged[0], before[diverged[0]], after[diverged[0]]),
    )
    assert found.largest is not None
    assert found.largest.absolute == max(abs(after[step] - before[step]) for step in diverged)
    published = run_of(mlflow_database)
    steps = f"{lost} of {lost} step{'s' if lost > 1 else ''}"
    assert published.data.tags["ckpt.replay"].startswith(f"diverged: {steps}, attempt 2; first ")
    client = MlflowClient(mlflow_database)
    history = client.get_metric_history(published.info.run_id, "loss")
    stands = {**after, **before} if metrics == "live" else {**before, **after}
    assert {row.step: row.value for row in history} == stands
    check_published(drifting, mlflow_database, steps=16)


def _losses(attempt: Launch) -> dict[int, float]:
    rows = [row for event in attempt.of(MetricsLogged) for row in event.rows]
    return {step: float(value) for key, value, step, _ in rows if key == "loss"}
