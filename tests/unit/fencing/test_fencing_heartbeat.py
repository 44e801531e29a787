"""Heartbeats, and the fence."""

from __future__ import annotations

import threading

import pytest
from support.made_runs import HookedStore, MadeRun, memory_store

from ckpt_tasks.errors import StaleAttemptError, StoreError
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.fencing.heartbeat import Heart, HeartbeatObserver, read_heartbeat
from ckpt_tasks.format.codec import encode
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import Failure, Heartbeat, now
from ckpt_tasks.store import Store
from ckpt_tasks.testing import FakeClock, Fault, FaultyStore
from ckpt_tasks.testing.wrappers import Operation

LAYOUT = RunLayout("digits")


@pytest.fixture
def store() -> Store:
    return memory_store()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def beat(store: Store, number: int, *, ended: bool = False) -> None:
    record = Heartbeat(attempt=1, beat=number, at=now(), ended=ended)
    store.put(LAYOUT.heartbeat(1), encode(record))


class BeatCounter(HookedStore):
    """Says when so many beats have been written."""

    def __init__(self, store: Store, beats: int) -> None:
        super().__init__(store, self._count)
        self.enough = threading.Event()
        self._left = beats

    def _count(self, operation: Operation, path: str) -> None:
        self._left -= 1
        if self._left < 0:  # the one before this has been written
            self.enough.set()


def test_heart_beats_until_stopped(store: Store) -> None:
    """Each beat has another number and tells the step; only the last one says that it has ended."""
    counter = BeatCounter(store, 3)
    heart = Heart(counter, LAYOUT, 1, interval=0.001)
    heart.step = 12
    heart.start()
    assert counter.enough.wait(30)
    alive = read_heartbeat(store, LAYOUT, 1)
    heart.stop(ended=True)
    last = read_heartbeat(store, LAYOUT, 1)
    assert alive is not None
    assert last is not None
    assert (alive.ended, last.ended) == (False, True)
    assert (last.attempt, last.step) == (1, 12)
    assert last.beat > alive.beat >= 3
    assert last.uptime is not None
    assert heart.last_error is None


def test_heart_tells_what_the_attempt_ended_with(store: Store) -> None:
    """A failure that has become known stands in the beats from then on, and in the last."""
    heart = Heart(store, LAYOUT, 1, interval=3600)
    heart.start()
    heart.failure = Failure(kind="ValueError: bad", step=12)
    heart.stop(ended=True)
    last = read_heartbeat(store, LAYOUT, 1)
    assert last is not None
    assert last.failure == Failure(kind="ValueError: bad", step=12)


def test_first_beat_comes_at_once(store: Store) -> None:
    """A heart with a long interval is seen alive before it has passed."""
    counter = BeatCounter(store, 1)
    heart = Heart(counter, LAYOUT, 1, interval=3600)
    heart.start()
    heart.stop(ended=True)
    last = read_heartbeat(store, LAYOUT, 1)
    assert last is not None
    assert (last.beat, last.ended) == (2, True)


def test_heart_stopped_in_an_attempt_that_goes_on(store: Store) -> None:
    """Its last beat does not say that the attempt is over."""
    heart = Heart(store, LAYOUT, 1, interval=3600)
    heart.start()
    heart.stop(ended=False)
    last = read_heartbeat(store, LAYOUT, 1)
    assert last is not None
    assert (last.beat, last.ended) == (1, False)


def test_missed_beat_costs_nothing(store: Store) -> None:
    """A store that fails for a while leaves an error to look at, and the heart goes on."""
    faulty = FaultyStore(store, [Fault(at=1, times=2)], counted={"put"})
    counter = BeatCounter(faulty, 3)
    heart = Heart(counter, LAYOUT, 1, interval=0.001)
    heart.start()
    assert counter.enough.wait(30)
    heart.stop(ended=True)
    assert (heart.last_error, heart.missed) == (None, 0)
    assert read_heartbeat(store, LAYOUT, 1) is not None


def test_failing_store_is_told(store: Store) -> None:
    """The latest error is kept, and how many beats it is that failed."""
    heart = Heart(FaultyStore(store, [Fault(at=1, times=999)]), LAYOUT, 1, interval=3600)
    heart.start()
    heart.stop(ended=True)
    assert isinstance(heart.last_error, StoreError)
    assert heart.missed == 2


def test_silence_is_measured_by_the_observers_clock(store: Store, clock: FakeClock) -> None:
    """The same beat for the time asked for is silence, whatever time it claims to be of."""
    beat(store, 5)
    observer = HeartbeatObserver(store, LAYOUT, 1, sleep=clock.sleep, clock=clock)
    assert observer.is_silent(60)
    assert clock() == pytest.approx(60)


@pytest.mark.parametrize("first", [None, 5])
def test_any_change_is_life(store: Store, clock: FakeClock, first: int | None) -> None:
    """Another beat ends the watch, at whatever time it comes; a first one is a change as well."""
    if first is not None:
        beat(store, first)

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if clock() > 30:
            beat(store, 6)

    assert not HeartbeatObserver(store, LAYOUT, 1, sleep=sleep, clock=clock).is_silent(60)
    assert 30 < clock() < 32


def test_end_is_silence_at_once(store: Store, clock: FakeClock) -> None:
    """Said before or during the watch, it needs no more waiting."""
    beat(store, 5)

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        beat(store, 6, ended=True)

    observer = HeartbeatObserver(store, LAYOUT, 1, sleep=sleep, clock=clock)
    assert observer.is_silent(60)
    assert len(clock.slept) == 1
    assert observer.is_silent(60)
    assert len(clock.slept) == 1


def test_unreadable_heartbeat_is_no_sign_of_life(store: Store, clock: FakeClock) -> None:
    """It protects nothing by itself."""
    store.put(LAYOUT.heartbeat(1), b"scribble")
    assert read_heartbeat(store, LAYOUT, 1) is None
    observer = HeartbeatObserver(store, LAYOUT, 1, sleep=clock.sleep, clock=clock)
    assert observer.is_silent(10)


# -- the fence ------------------------------------------------------------------------------------


def test_fence_of_the_newest_attempt() -> None:
    """It owns its run, and still does when earlier ones are many."""
    run = MadeRun()
    run.claim()
    newest = run.claim()
    Fence(run.store, run.layout, newest.number).check()


def test_fence_of_an_earlier_attempt() -> None:
    """It is stale from the moment of the next claim; the error names both, with exit code 3."""
    run = MadeRun()
    fence = Fence(run.store, run.layout, run.claim().number)
    fence.check()
    run.claim()
    with pytest.raises(StaleAttemptError, match=r"attempt 1 .* stale: attempt 2") as caught:
        fence.check()
    assert caught.value.exit_code == 3


def test_fence_asks_one_question() -> None:
    """One uncached request answers."""
    run = MadeRun()
    run.claim()
    store = FaultyStore(run.store, counted={"exists", "read", "list_objects", "size"})
    Fence(store, run.layout, 1).check()
    assert store.log == [("exists", run.layout.attempt(2))]


def test_unreachable_fence_is_waited_for(clock: FakeClock) -> None:
    """While the store does not answer, it is asked again."""
    run = MadeRun()
    store = FaultyStore(run.store, [Fault(at=1, times=3)], counted={"exists"})
    Fence(store, run.layout, 1).wait(seconds=10, pause=1, sleep=clock.sleep, clock=clock)
    assert clock.slept == [1, 1, 1]


def test_fence_that_stays_unreachable(clock: FakeClock) -> None:
    """After the time given, the store's error is raised."""
    run = MadeRun()
    store = FaultyStore(run.store, [Fault(at=1, times=999)], counted={"exists"})
    clock.sleep(5)
    with pytest.raises(StoreError):
        Fence(store, run.layout, 1).wait(seconds=10, pause=1, sleep=clock.sleep, clock=clock)
    assert clock() == 15


def test_stale_attempt_does_not_wait(clock: FakeClock) -> None:
    """An answer that says stale is final."""
    run = MadeRun()
    run.claim()
    run.claim()
    with pytest.raises(StaleAttemptError):
        Fence(run.store, run.layout, 1).wait(seconds=10, sleep=clock.sleep, clock=clock)
    assert clock.slept == []
