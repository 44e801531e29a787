"""The registrar while storage does not answer: it waits, tells, and then does all of its work."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.launches import wait_until
from support.made_runs import HookedStore, MadeAttempt, MadeRun
from support.toy_runs import toy_spec

from ckpt_tasks.config import AttemptConfig, CheckpointConfig, RegistryConfig
from ckpt_tasks.errors import ConfigError, StoreError
from ckpt_tasks.events import (
    AttemptClaimed,
    AttemptResumed,
    CheckpointCommitted,
    Event,
    EventLog,
    EventReader,
    MetricsLogged,
    MetricsReplayed,
    RegistryUnavailable,
    Warned,
)
from ckpt_tasks.fencing.attempts import read_attempts
from ckpt_tasks.fencing.heartbeat import read_heartbeat
from ckpt_tasks.format.records import Heartbeat
from ckpt_tasks.registry import RunDescription
from ckpt_tasks.store import Store
from ckpt_tasks.testing import MemoryRegistry, RegistryMemory
from ckpt_tasks.testing.wrappers import Operation
from ckpt_tasks.training.registration import registrar
from ckpt_tasks.training.registration.registrar import Registrar
from ckpt_tasks.training.registration.tail import read_tails
from ckpt_tasks.training.spec import AttemptFolder, TrainOutcome
from ckpt_tasks.types import EXIT_DONE, MetricRow, Position


class Outage:
    """A store that cannot be opened, or read, as often as told.

    Parameters
    ----------
    opening
        What the first attempts to open it end with.
    reading
        How often the attempt's claim cannot be read.
    """

    def __init__(self, run: MadeRun, *, opening: list[Exception], reading: int = 0) -> None:
        self._run = run
        self._opening = opening
        self._reading = reading
        self.beats_fail = False

    def open(self, config: object) -> Store:
        if self._opening:
            raise self._opening.pop(0)
        return HookedStore(self._run.store, self._before)

    def _before(self, operation: Operation, path: str) -> None:
        if operation == "read" and path == self._run.layout.attempt(1) and self._reading:
            self._reading -= 1
            raise StoreError("SlowDown")
        if self.beats_fail and path == self._run.layout.heartbeat(1):
            raise StoreError("SlowDown")


class Scene:
    """A registrar in this process, and the trainer's events that it follows."""

    def __init__(self, folder: Path, run: MadeRun, *, registers: bool) -> None:
        folder.mkdir()
        self.folder = AttemptFolder(folder)
        self.run = run
        self.attempt: MadeAttempt = run.begin()
        self.emit = EventLog(self.folder.trainer_events)
        uri = "memory" if registers else None
        self.folder.write_spec(
            toy_spec(
                "memory://unused",
                run=run.name,
                config=CheckpointConfig(
                    registry=RegistryConfig(tracking_uri=uri),
                    attempt=AttemptConfig(heartbeat=0.01, takeover_after=7.0, drain=2.0),
                ),
            )
        )

    def train(self) -> str:
        """Tell what a trainer does: claim, resume, log, commit."""
        number, uid = self.attempt.number, self.run.identity.uid
        self.emit(
            AttemptClaimed(
                run=self.run.name, uid=uid, attempt=number, invocation="i", pid=os.getpid()
            )
        )
        self.emit(
            AttemptResumed(attempt=number, checkpoint=None, position=Position(), why="the first")
        )
        self.emit(MetricsLogged(rows=[("loss", 0.5, 1, 1000)]))
        saved = str(self.attempt.save(1))
        self.emit(
            CheckpointCommitted(
                checkpoint=saved,
                position=Position(step=1),
                trigger="steps",
                reason="a test",
                size=1,
                seconds=0.0,
            )
        )
        return saved

    @contextmanager
    def running(self) -> Iterator[None]:
        """Until the block ends; then the attempt has ended as well."""
        read, write = os.pipe()
        codes: list[int] = []
        body = Registrar(self.folder, read)
        thread = threading.Thread(target=lambda: codes.append(body.run()))
        thread.start()
        try:
            yield
        finally:
            outcome = TrainOutcome(code=EXIT_DONE, message="done", run=self.run.name)
            self.folder.write_outcome(outcome, self.folder.outcome)
            os.close(write)
            thread.join(30)
        assert codes == [0]

    def told(self, kind: type[Event]) -> list[Event]:
        return [e for e in EventReader(self.folder.registrar_events).read() if isinstance(e, kind)]

    def warnings(self) -> list[str]:
        return [event.message for event in self.told(Warned) if isinstance(event, Warned)]

    def heartbeat(self) -> Heartbeat | None:
        return read_heartbeat(self.run.store, self.run.layout, 1)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> RegistryMemory:
    """What the registrar's registry holds; its pauses are short."""
    memory = RegistryMemory()
    monkeypatch.setattr(registrar, "load_registry", lambda config: MemoryRegistry(memory))
    monkeypatch.setattr(registrar, "_FIRST_BACKOFF", 0.01)
    monkeypatch.setattr(registrar, "_POLL_SECONDS", 0.01)
    return memory


@pytest.mark.parametrize(
    "error", [StoreError("cannot open: timed out"), ConfigError("the token has expired")]
)
def test_an_outage_behind_the_claim_costs_nothing(
    error: Exception, tmp_path: Path, memory: RegistryMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening the store and reading the hyperparameters are tried again, and told once; then
    everything that came meanwhile is published, and the heart beats while training goes on.
    """
    run = MadeRun()
    outage = Outage(run, opening=[error] * 3, reading=2)
    monkeypatch.setattr(registrar, "open_store", outage.open)
    scene = Scene(tmp_path / "attempt", run, registers=True)
    saved = scene.train()
    with scene.running():
        wait_until(lambda: bool(memory.versions), "a registered checkpoint", timeout=20)
        beat = scene.heartbeat()
        assert beat is not None
        assert not beat.ended
    (stored,) = memory.runs.values()
    assert [version.checkpoint for version in memory.versions] == [saved]
    assert [(row.key, row.step) for row in stored.rows] == [("loss", 1)]
    (told,) = scene.warnings()
    assert str(error) in told
    assert "after 7 s of silence another invocation may take the run over" in told
    assert scene.told(RegistryUnavailable)
    last = scene.heartbeat()
    assert last is not None
    assert last.ended


def test_an_outage_that_lasts_to_the_end(
    tmp_path: Path, memory: RegistryMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the attempt is noticed, and the drain's deadline bounds the wait."""
    run = MadeRun()
    outage = Outage(run, opening=[StoreError("timed out")] * 100_000)
    monkeypatch.setattr(registrar, "open_store", outage.open)
    scene = Scene(tmp_path / "attempt", run, registers=True)
    scene.train()
    with scene.running():
        wait_until(lambda: bool(scene.warnings()), "a warning", timeout=20)
    assert memory.versions == []
    assert scene.heartbeat() is None


def test_a_heart_that_cannot_beat_is_told_once_an_outage(
    tmp_path: Path, memory: RegistryMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a registry, too; however many beats fail; and again when that comes back."""
    run = MadeRun()
    outage = Outage(run, opening=[])
    monkeypatch.setattr(registrar, "open_store", outage.open)
    scene = Scene(tmp_path / "attempt", run, registers=False)
    scene.train()
    with scene.running():
        for outages in (1, 2):
            outage.beats_fail = True
            _wait_for_warnings(scene, outages)
            outage.beats_fail = False
            _wait_for_beats(scene, 1)
            _wait_for_beats(scene, 20)  # the registrar has seen it recover
    assert all("SlowDown" in message for message in scene.warnings())
    assert len(scene.warnings()) == 2
    assert not scene.told(RegistryUnavailable)


def test_a_registrar_in_anothers_place_tells_no_replay_again(
    tmp_path: Path, memory: RegistryMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds its own attempt's steps in the registry, which have not been done again; the
    heartbeat says what the one before it has found.
    """
    run = MadeRun()
    monkeypatch.setattr(registrar, "open_store", Outage(run, opening=[]).open)
    description = RunDescription(
        run=run.name, uid=run.identity.uid, store_url="memory:", hyperparameters={}
    )
    stored = memory.runs[memory.new_run(description)]
    stored.rows[MetricRow("loss", 0.25, 1, 5)] = None  # of an attempt before
    scene = Scene(tmp_path / "attempt", run, registers=True)
    scene.train()
    scene.emit(MetricsLogged(rows=[("loss", 0.5, step, 1000) for step in (2, 3)]))
    for _ in range(2):
        with scene.running():
            pass
        (told,) = scene.told(MetricsReplayed)
        assert isinstance(told, MetricsReplayed)
        assert str(told.replay).startswith("replayed 1 step, 1 came out differently, first step 1")
        beat = scene.heartbeat()
        assert beat is not None
        assert beat.replay == told.replay
    assert [row.step for row in stored.rows] == [1, 2, 3]
    assert stored.tags["replay"] == (
        "diverged: 1 of 1 step, attempt 1; first step 1 (loss); largest difference 0.25 (loss, "
        "step 1)"
    )


def test_what_the_registry_does_not_take_at_the_end_is_kept(
    tmp_path: Path, memory: RegistryMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics behind the last checkpoint, which has none of them, lie in the store then."""
    run = MadeRun()
    monkeypatch.setattr(registrar, "open_store", Outage(run, opening=[]).open)
    scene = Scene(tmp_path / "attempt", run, registers=True)
    memory.available = False
    scene.train()
    with scene.running():
        pass
    ((row,),) = read_tails(run.store, run.layout, read_attempts(run.store, run.layout), behind=None)
    assert row == MetricRow("loss", 0.5, 1, 1000)


def test_one_whose_supervisor_is_gone_pauses_between_looks(
    tmp_path: Path, memory: RegistryMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the trainer, or its last save, goes on: it must not take a processor from them."""
    run = MadeRun()
    pauses: list[float] = []
    lives = iter([True] * 20)
    monkeypatch.setattr(registrar, "open_store", Outage(run, opening=[]).open)
    monkeypatch.setattr(registrar, "process_is_alive", lambda process: next(lives, False))
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=pauses.append)
    monkeypatch.setattr(registrar, "time", clock)
    scene = Scene(tmp_path / "attempt", run, registers=True)
    scene.train()
    read, write = os.pipe()
    body = threading.Thread(target=Registrar(scene.folder, read).run)
    body.start()
    wait_until(lambda: scene.heartbeat() is not None, "a heartbeat", timeout=20)
    os.close(write)
    body.join(30)
    assert len(pauses) >= 20


def _wait_for_warnings(scene: Scene, count: int) -> None:
    wait_until(lambda: len(scene.warnings()) == count, "a warning", timeout=20)


def _wait_for_beats(scene: Scene, more: int) -> None:
    def number() -> int:
        beat = scene.heartbeat()
        return beat.beat if beat is not None else 0

    before = number()
    wait_until(lambda: number() >= before + more, "heartbeats", timeout=20)
