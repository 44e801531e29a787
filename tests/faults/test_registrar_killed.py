"""A registrar that is killed again and again: the heart beats on, until that is given up, aloud."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.launches import TOY, launched, registrar_of, wait_gone, wait_until
from support.toy_runs import toy_spec

from ckpt_tasks.events import AttemptClaimed, Warned
from ckpt_tasks.fencing.heartbeat import read_heartbeat
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import Heartbeat
from ckpt_tasks.store import open_store
from ckpt_tasks.training.spec import TrainSpec


@pytest.fixture
def spec(root: Path, monkeypatch: pytest.MonkeyPatch) -> TrainSpec:
    """A training whose first step does not end."""
    monkeypatch.setenv("TOY_STEP_SECONDS", "1000")
    return toy_spec(root, entrypoint=f"{TOY}:train")


def _heartbeat(spec: TrainSpec) -> Heartbeat | None:
    with open_store(spec.config.store) as store:
        return read_heartbeat(store, RunLayout(spec.run), 1)


def _wait_for_another(spec: TrainSpec, beat: Heartbeat | None) -> None:
    wait_until(lambda: _heartbeat(spec) != beat, "a beat")


def test_a_registrar_killed_five_times(spec: TrainSpec) -> None:
    """Each of the four started after it beats; the last death is told, with what it costs, while
    training goes on.
    """
    with launched(spec) as attempt:
        attempt.wait_for(AttemptClaimed)
        supervisor = attempt.supervisor
        for _ in range(5):
            before = _heartbeat(spec)
            registrar = registrar_of(supervisor)
            _wait_for_another(spec, before)
            registrar.kill()
            wait_gone([registrar])
        warned = attempt.wait_for(Warned)
        assert attempt.trainer.is_running()
        attempt.trainer.kill()
        attempt.outcome()
    assert "the registrar died 5 times and is not started again" in warned.message
    assert "another invocation may take the run over" in warned.message
    assert len(attempt.of(Warned)) == 1


def test_a_registrar_killed_just_before_the_end(spec: TrainSpec) -> None:
    """Its successor does not wait for its pause to say that the attempt is over."""
    with launched(spec) as attempt:
        attempt.wait_for(AttemptClaimed)
        wait_until(lambda: _heartbeat(spec) is not None, "a beat")
        registrar, trainer = attempt.registrar, attempt.trainer
        registrar.kill()
        trainer.kill()
        attempt.outcome()
    beat = _heartbeat(spec)
    assert beat is not None
    assert beat.ended
