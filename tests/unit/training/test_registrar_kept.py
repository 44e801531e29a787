"""A registrar that dies is started again: with pauses, not for ever, and never silently."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from support.scarce import no_more_files
from support.toy_runs import toy_spec

from ckpt_tasks.config import CheckpointConfig, RegistryConfig
from ckpt_tasks.testing import FakeClock
from ckpt_tasks.training.spec import AttemptFolder
from ckpt_tasks.training.supervision.child import Child
from ckpt_tasks.training.supervision.supervisor import RegistrarKeeper


class FakeRegistrar:
    """Dies `lifetime` seconds after each start."""

    def __init__(self, clock: FakeClock, lifetime: float) -> None:
        self._clock = clock
        self._lifetime = lifetime
        self._started = clock()
        self.restarts: list[float] = []

    def has_failed(self) -> bool:
        return self._clock() - self._started >= self._lifetime

    def restart(self) -> None:
        self._started = self._clock()
        self.restarts.append(self._started)


class Scene:
    """A keeper that looks twice a second."""

    def __init__(self, lifetime: float, *, tracking_uri: str | None = None) -> None:
        self.told: list[str] = []
        self.clock = FakeClock()
        self.registrar = FakeRegistrar(self.clock, lifetime)
        config = CheckpointConfig(registry=RegistryConfig(tracking_uri=tracking_uri))
        spec = toy_spec("memory://kept", config=config)
        self.keeper = RegistrarKeeper(self.registrar, spec, self.told.append, clock=self.clock)

    def pass_seconds(self, seconds: float) -> None:
        for _ in range(int(2 * seconds)):
            self.keeper.look()
            self.clock.sleep(0.5)


def test_pauses_grow_between_starts() -> None:
    """One that dies at once is started four times more, each time after twice the pause."""
    scene = Scene(lifetime=0.0)
    scene.pass_seconds(1000)
    starts = [0.0, *scene.registrar.restarts]
    pauses = [b - a for a, b in itertools.pairwise(starts)]
    assert pauses == pytest.approx([1.0, 2.0, 4.0, 8.0], abs=0.5)


@pytest.mark.parametrize("tracking_uri", [None, "http://mlflow"])
def test_giving_up_is_told_once(tracking_uri: str | None) -> None:
    """What it costs is said: the heartbeat, and, where there is a registry, what it lacks."""
    scene = Scene(lifetime=0.0, tracking_uri=tracking_uri)
    scene.pass_seconds(1000)
    (told,) = scene.told
    assert "died 5 times" in told
    assert "after 60 s another invocation may take the run over" in told
    assert ("registered" in told) == (tracking_uri is not None)
    scene.keeper.start_for_the_end()
    assert len(scene.registrar.restarts) == 4


def test_a_healthy_time_gives_the_starts_back() -> None:
    """Twenty deaths spread over hours do not end publishing."""
    scene = Scene(lifetime=600.0)
    scene.pass_seconds(20 * 610)
    assert len(scene.registrar.restarts) >= 19
    assert scene.told == []


def test_an_unhealthy_time_does_not() -> None:
    """One that never lasts a minute is left after its fifth death."""
    scene = Scene(lifetime=50.0)
    scene.pass_seconds(1000)
    assert len(scene.registrar.restarts) == 4
    assert len(scene.told) == 1


def test_the_end_waits_for_no_pause() -> None:
    """One that is dead when training ends is started once more, to publish the rest."""
    scene = Scene(lifetime=0.0)
    scene.keeper.look()
    assert scene.registrar.restarts == []
    scene.keeper.start_for_the_end()
    assert scene.registrar.restarts == [0.0]


def test_a_living_registrar_is_left_alone() -> None:
    """Neither while training goes on nor at its end is a second one started."""
    scene = Scene(lifetime=10_000.0)
    scene.pass_seconds(100)
    scene.keeper.start_for_the_end()
    assert scene.registrar.restarts == []


def test_one_that_cannot_be_started_ends_no_training(tmp_path: Path) -> None:
    """The system has no descriptor, or no memory, for it: it is tried again as one that died."""
    clock = FakeClock()
    open_files = len(os.listdir("/proc/self/fd"))
    with open(os.devnull, "wb") as output:
        child = Child(
            "ckpt_tasks.no_such_module", AttemptFolder(tmp_path), output, name="registrar"
        )
        first = child.process
        first.wait()
        keeper = RegistrarKeeper(child, toy_spec("memory://kept"), [].append, clock=clock)
        with no_more_files():
            for _ in range(5):
                keeper.look()
                clock.sleep(0.5)
        assert child.process is first
        for _ in range(5):
            keeper.look()
            clock.sleep(0.5)
        assert child.process is not first
        child.process.wait()
        child.let_go()
    assert len(os.listdir("/proc/self/fd")) == open_files
