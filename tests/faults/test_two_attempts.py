"""Two attempts alive at once: the older stops, and changes nothing any more."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from mlflow import MlflowClient
from support.attempt_forks import AttemptForks, Fork, Kill
from support.claims import move_claim_elsewhere
from support.launches import TOY, Launch, family, kill_all, launched, wait_gone, wait_until
from support.mlflow_server import MlflowServer
from support.run_checks import check_run, trained_steps
from support.toy_runs import STEPS, Digest, toy_spec

from ckpt_tasks.config import AttemptConfig, RegistryConfig
from ckpt_tasks.events import (
    AttemptClaimed,
    CheckpointCommitted,
    CheckpointRegistered,
    MetricsLogged,
)
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import EXIT_BUSY, EXIT_DONE, EXIT_STALE

STEP_PACE = "0.2"


@pytest.fixture
def spec(root: Path) -> TrainSpec:
    """The toy training, watched closely."""
    spec = toy_spec(root, entrypoint=f"{TOY}:train")
    attempt = AttemptConfig(heartbeat=0.5, takeover_after=3.0)
    return msgspec.structs.replace(
        spec, config=msgspec.structs.replace(spec.config, attempt=attempt)
    )


def _contents(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def _wait_stopped(fork: Fork) -> None:
    process = psutil.Process(fork.pid)
    wait_until(lambda: process.status() == psutil.STATUS_STOPPED, "the pause")


def _by(spec: TrainSpec, invocation: str) -> TrainSpec:
    return msgspec.structs.replace(spec, invocation=invocation)


@pytest.fixture
def paused(spec: TrainSpec, forks: AttemptForks, root: Path) -> Iterator[Fork]:
    """An attempt that stands still in step 13, and that nobody can look at from here."""
    fork = forks.start(spec, hold_at_step=12)
    wait_until(lambda: fork.held, "step 13")
    fork.pause()
    _wait_stopped(fork)
    move_claim_elsewhere(root, spec.run, 1)
    yield fork
    kill_all([psutil.Process(fork.pid)] if psutil.pid_exists(fork.pid) else [])


def test_the_older_attempt_is_stale(
    spec: TrainSpec, root: Path, paused: Fork, finish: Callable[[TrainSpec], None]
) -> None:
    """A retry of the invocation takes over at once; the older one wakes up, and ends with 3."""
    finish(spec)
    check_run(spec, steps=STEPS)
    before = _contents(root)
    paused.let_go()
    paused.resume()
    outcome = paused.wait().outcome
    assert outcome.code == EXIT_STALE
    assert "attempt 2" in outcome.message
    after = _contents(root)
    # Data that it had begun to write is nobody's checkpoint; all that was there is as it was.
    assert {path: after[path] for path in before} == before
    assert all(path.startswith("toy/data/a0001-") for path in after.keys() - before.keys())
    check_run(spec, steps=STEPS)


@pytest.mark.parametrize("seed", range(8))
def test_the_older_attempt_is_stale_in_the_midst_of_a_save(
    seed: int,
    spec: TrainSpec,
    root: Path,
    forks: AttemptForks,
    digest: Digest,
    expected_digest: str,
) -> None:
    """Wherever in a save it had stopped, it ends with 3, and the run is the later attempt's."""
    delay = random.Random(seed).uniform(0.0, 0.006)  # noqa: S311 - reproducible, not secret
    stop = Kill(event="SaveStarted", nth=2, delay=delay, signal="SIGSTOP")
    older = forks.start(spec, kill=stop)
    _wait_stopped(older)
    move_claim_elsewhere(root, spec.run, 1)
    newer = forks.run(spec, environment=digest.environment)
    assert newer.outcome.code == EXIT_DONE, newer.output
    older.resume()
    assert older.wait().outcome.code == EXIT_STALE, older.output
    assert digest.read() == expected_digest
    assert trained_steps(spec) == list(range(1, STEPS + 1))
    again = forks.run(spec)
    assert "complete already" in again.outcome.message


def test_the_older_attempt_publishes_nothing(
    spec: TrainSpec,
    root: Path,
    mlflow_server: MlflowServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its registrar too is stale: no version, no alias, no metric, no status after the takeover."""
    monkeypatch.setenv("TOY_STEP_SECONDS", "1")  # it trains until its registration is seen
    registry = RegistryConfig(
        tracking_uri=mlflow_server.uri, experiment="two-attempts", best="loss:min"
    )
    config = msgspec.structs.replace(spec.config, registry=registry)
    registered = msgspec.structs.replace(spec, config=config)
    with launched(registered) as older:
        older.wait_for(CheckpointRegistered)
        # A request that the fence has let pass before the pause is not what this is about.
        wait_until(lambda: bool(_published(mlflow_server.uri)["note"]), "the registrar's note")
        members = family(older.supervisor)
        older.trainer.suspend()
        wait_until(
            lambda: _published(mlflow_server.uri)["loss"] == _logged(older), "what it has logged"
        )
        older.registrar.suspend()
        move_claim_elsewhere(root, spec.run, 1)
        monkeypatch.setenv("TOY_STEP_SECONDS", "0")
        with launched(registered) as newer:
            outcome = newer.outcome()
            assert outcome.code == EXIT_DONE, newer.output
        before = _published(mlflow_server.uri)
        for process in members:
            process.resume()
        stale = older.outcome()
        wait_gone(members)
    assert stale.code == EXIT_STALE, stale
    assert _published(mlflow_server.uri) == before
    assert before["status"] == "FINISHED"
    assert before["loss"] == list(range(1, STEPS + 1))


def _logged(attempt: Launch) -> list[int]:
    """Steps whose loss the trainer has told its registrar."""
    rows = [row for event in attempt.of(MetricsLogged) for row in event.rows]
    return [step for key, _, step, _ in rows if key == "loss"]


def _published(uri: str) -> dict[str, object]:
    """All that MLflow holds of the one run."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("two-attempts")
    (run,) = client.search_runs([experiment.experiment_id])
    versions = client.search_model_versions("name='two-attempts'")
    return {
        "status": run.info.status,
        "loss": [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")],
        "versions": sorted((version.version, version.source) for version in versions),
        "aliases": dict(client.get_registered_model("two-attempts").aliases),
        "note": run.data.tags.get("mlflow.note.content"),
    }


def test_another_invocation_of_a_live_run_is_told_that_it_is_busy(
    spec: TrainSpec,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    forks: AttemptForks,
    finish: Callable[[TrainSpec], None],
) -> None:
    """It gets 5 while the owner lives, and the run when the owner's machine has gone down."""
    monkeypatch.setenv("TOY_STEP_SECONDS", STEP_PACE)
    with launched(spec) as owner:
        owner.wait_for(CheckpointCommitted)
        busy = forks.run(_by(spec, "flow-run-2")).outcome
        assert busy.code == EXIT_BUSY
        assert "flow-run-1" in busy.message
        assert "--takeover" in busy.message
        assert owner.is_running
        members = family(owner.supervisor)
        kill_all(members)
        wait_gone(members)
        owner.outcome()
    finish(_by(spec, "flow-run-2"))
    check_run(spec, steps=STEPS)


def test_another_host_takes_over_after_silence(
    spec: TrainSpec,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    forks: AttemptForks,
    finish: Callable[[TrainSpec], None],
) -> None:
    """Where the owner's process cannot be looked at, its heartbeat decides, by this clock."""
    monkeypatch.setenv("TOY_STEP_SECONDS", STEP_PACE)
    with launched(spec) as owner:
        owner.wait_for(CheckpointCommitted)
        move_claim_elsewhere(root, spec.run, 1)
        assert forks.run(_by(spec, "flow-run-2")).outcome.code == EXIT_BUSY
        assert owner.is_running
        members = family(owner.supervisor)
        kill_all(members)
        wait_gone(members)
        owner.outcome()
    finish(_by(spec, "flow-run-2"))
    check_run(spec, steps=STEPS)


def test_takeover_on_request(
    spec: TrainSpec,
    monkeypatch: pytest.MonkeyPatch,
    finish: Callable[[TrainSpec], None],
) -> None:
    """With ``takeover`` another invocation ends the owner's process and goes on from its last; the
    owner's launcher knows why.
    """
    monkeypatch.setenv("TOY_STEP_SECONDS", STEP_PACE)
    with launched(spec) as owner:
        owner.wait_for(CheckpointCommitted)
        claimed = owner.wait_for(AttemptClaimed)
        trainer = owner.trainer
        finish(msgspec.structs.replace(_by(spec, "flow-run-2"), takeover=True))
        assert claimed.pid == trainer.pid
        wait_gone([trainer])
        outcome = owner.outcome()
    assert outcome.code == EXIT_STALE, outcome
    assert outcome.message.startswith("attempt 2 has taken the run over")
    check_run(spec, steps=STEPS)
