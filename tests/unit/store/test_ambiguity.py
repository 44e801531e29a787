"""`create_once` finds out whose object stands when the store does not say."""

from __future__ import annotations

import os
import random

import pytest
from support.made_runs import HookedStore

from ckpt_tasks.errors import ConfigError, NoSpaceError, StoreError
from ckpt_tasks.store import create_once
from ckpt_tasks.store.memory import MemoryStore
from ckpt_tasks.testing import FakeClock, Fault, FaultyStore
from ckpt_tasks.testing.wrappers import Operation


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore(f"ambiguity-{os.urandom(8).hex()}")


def test_ours_and_theirs(memory: MemoryStore) -> None:
    """Who comes first owns the object; repeating the identical create is still ours."""
    assert create_once(memory, "run/x", b"ours") is True
    assert create_once(memory, "run/x", b"ours") is True
    assert create_once(memory, "run/x", b"theirs") is False
    assert memory.read("run/x") == b"ours"


@pytest.mark.parametrize("theirs", [b"", b"our", b"ours and more", b"OURS"])
def test_any_other_bytes_are_theirs(memory: MemoryStore, theirs: bytes) -> None:
    """An object that is shorter, longer or different is somebody else's."""
    memory.create("run/x", theirs)
    assert create_once(memory, "run/x", b"ours") is False


@pytest.mark.parametrize("when", ["before", "after", "late"])
@pytest.mark.parametrize("times", [1, 3, 5])
def test_faults_that_end_are_overcome(memory: MemoryStore, when: str, times: int) -> None:
    """Requests that are lost, whose answers are lost, or that land late, end in True."""
    store = FaultyStore(memory, [Fault(at=1, when=when, times=times)])
    assert create_once(store, "run/x", b"ours", sleep=FakeClock().sleep) is True
    store.land()
    assert memory.read("run/x") == b"ours"


def test_late_put_of_another_does_not_win(memory: MemoryStore) -> None:
    """A create of somebody else that lands between our tries makes the answer False."""
    theirs = FaultyStore(memory, [Fault(at=1, when="late", delay=99)])
    with pytest.raises(StoreError):
        theirs.create("run/x", b"theirs")
    ours = FaultyStore(memory, [Fault(at=1)])
    answer = create_once(ours, "run/x", b"ours", sleep=lambda seconds: theirs.land())
    assert answer is False
    assert memory.read("run/x") == b"theirs"


def test_gives_up_after_a_bounded_wait(memory: MemoryStore) -> None:
    """A store that never answers raises, after the same delays each time, in seconds."""
    slept = []
    for _ in range(2):
        clock = FakeClock()
        store = FaultyStore(memory, [Fault(at=1, times=100)])
        with pytest.raises(StoreError, match="not known after 6 tries") as caught:
            create_once(store, "run/x", b"ours", sleep=clock.sleep)
        assert not isinstance(caught.value, NoSpaceError)
        slept.append(clock.slept)
    assert slept[0] == slept[1] == sorted(slept[0])
    assert 1 < sum(slept[0]) < 10


def test_a_full_disk_is_told_as_such(memory: MemoryStore) -> None:
    """Whoever can make room then does."""

    def before(operation: Operation, path: str) -> None:
        raise NoSpaceError("no space left")

    with pytest.raises(NoSpaceError, match="not known after 6 tries"):
        create_once(HookedStore(memory, before), "run/x", b"ours", sleep=FakeClock().sleep)


def test_unreadable_object_is_not_guessed(memory: MemoryStore) -> None:
    """When there is an object and it cannot be read, neither answer is given."""
    memory.create("run/x", b"theirs")
    store = FaultyStore(memory, [Fault(at=1, times=100)], counted={"read"})
    with pytest.raises(StoreError, match="not known"):
        create_once(store, "run/x", b"ours", sleep=FakeClock().sleep)


def test_object_that_vanishes_is_created_again(memory: MemoryStore) -> None:
    """Somebody else's that was removed before it could be read has not won."""
    memory.create("run/x", b"theirs")

    def before(operation: Operation, path: str) -> None:
        if operation == "read":
            memory.delete(path)

    store = HookedStore(memory, before)
    assert create_once(store, "run/x", b"ours", sleep=FakeClock().sleep) is True
    assert memory.read("run/x") == b"ours"


def test_draws_no_random_numbers(memory: MemoryStore) -> None:
    """Its waits take nothing from the global generator, which belongs to the training."""
    before = random.getstate()
    store = FaultyStore(memory, [Fault(at=1, times=4)])
    create_once(store, "run/x", b"ours", sleep=FakeClock().sleep)
    assert random.getstate() == before


def test_mistakes_are_not_retried(memory: MemoryStore) -> None:
    """What no retry can change comes through at once."""
    clock = FakeClock()
    with pytest.raises(ConfigError):
        create_once(memory, "../x", b"ours", sleep=clock.sleep)
    assert clock.slept == []
