"""Which checkpoints belong to the run as it stands."""

from __future__ import annotations

import threading

import msgspec
import pytest
from support.made_runs import HookedStore, MadeRun

from ckpt_tasks.checkpointer.catalog import list_checkpoints
from ckpt_tasks.fencing.attempts import read_attempts
from ckpt_tasks.fencing.lineage import Lineage, extend_lineage, trace_lineage
from ckpt_tasks.format.codec import decode, encode
from ckpt_tasks.format.records import (
    LINEAGE_ENTRIES,
    AttemptClaim,
    LineageEntry,
    ResumedRecord,
)
from ckpt_tasks.types import CheckpointId


@pytest.fixture
def run() -> MadeRun:
    return MadeRun()


def valid(run: MadeRun) -> list[CheckpointId]:
    lineage = trace_lineage(read_attempts(run.store, run.layout))
    return lineage.valid(list_checkpoints(run.store, run.layout))


def test_no_attempt() -> None:
    """Without an attempt that resumed, nothing is valid."""
    assert trace_lineage([]).valid([CheckpointId(10, 1, 1)]) == []


def test_chain(run: MadeRun) -> None:
    """Each attempt's checkpoints up to where the next one started, newest first."""
    first = run.begin()
    one, two = first.save(10), first.save(20)
    three = run.begin().save(30)
    run.begin()
    assert valid(run) == [three, two, one]


def test_zombies_commit_after_the_resume(run: MadeRun) -> None:
    """What the old attempt committed later, or had committed beyond, is out."""
    first = run.begin()
    start = first.save(10)
    second = run.begin()
    newest = second.save(20)
    late = CheckpointId(99, 1, 2)
    lineage = trace_lineage(read_attempts(run.store, run.layout))
    assert lineage.valid([start, late, newest]) == [newest, start]


def test_explicit_id_cuts_the_chain(run: MadeRun) -> None:
    """Going back to an old checkpoint leaves everything behind it, whole attempts included."""
    first = run.begin()
    start = first.save(10)
    first.save(20)
    run.begin().save(30)
    third = run.begin("flow-run-2", resume=str(start))
    newest = third.save(15)
    assert valid(run) == [newest, start]


def test_explicit_id_of_a_zombie(run: MadeRun) -> None:
    """Going on from a zombie's makes it valid again, and what replaced it a dead branch."""
    first = run.begin()
    start = first.save(10)
    zombie = first.save(20)
    run.begin("flow-run-2", resume=str(start)).save(15)
    run.begin("flow-run-3", resume=str(zombie))
    assert valid(run) == [zombie, start]


def test_fresh_start_leaves_everything(run: MadeRun) -> None:
    """A lineage of its own."""
    run.begin().save(10)
    newest = run.begin("flow-run-2", resume="fresh").save(5)
    assert valid(run) == [newest]


def test_attempt_without_resumed_record_is_passed_over(run: MadeRun) -> None:
    """A claim alone changes nothing."""
    checkpoint = run.begin().save(10)
    run.claim()
    assert valid(run) == [checkpoint]


def test_more_attempts_than_a_record_keeps() -> None:
    """Records keep the latest entries; the earliest attempt's checkpoint stays valid."""
    run = MadeRun()
    made = []
    count = LINEAGE_ENTRIES + 5
    for step in range(1, count + 1):
        attempt = run.begin()
        made.append(attempt.save(step))
    assert len(attempt.recovered.resumed.lineage) == LINEAGE_ENTRIES
    assert valid(run) == made[::-1]


def test_extend_lineage_drops_the_oldest(run: MadeRun) -> None:
    """A new attempt's lineage is it, and what its start's record knows, up to the limit."""
    record = run.record(run.begin().save(10))
    entries = [
        LineageEntry(attempt=n, resumed_from=f"step-{n - 1:08d}-a{n - 1}-s1")
        for n in range(LINEAGE_ENTRIES + 1, 1, -1)
    ]
    extended = extend_lineage(LINEAGE_ENTRIES + 2, msgspec.structs.replace(record, lineage=entries))
    assert len(extended.entries) == LINEAGE_ENTRIES
    assert extended.entries[0] == LineageEntry(
        attempt=LINEAGE_ENTRIES + 2, resumed_from="step-00000010-a1-s1"
    )
    assert extended.entries[1:] == tuple(entries[:-1])


def test_lineage_of_a_new_start() -> None:
    """It holds the attempt alone."""
    assert extend_lineage(3, None) == Lineage((LineageEntry(attempt=3, resumed_from=None),))


# -- damage ---------------------------------------------------------------------------------------


def test_damaged_record_is_bridged_by_a_commit(run: MadeRun) -> None:
    """The newest attempt's own commits say what it started from."""
    one = run.begin().save(10)
    two = run.begin().save(20)
    run.damage(run.layout.resumed(2))
    view = read_attempts(run.store, run.layout)[1]
    assert view.resumed is not None
    assert view.resumed.checkpoint == str(one)
    assert "attempts/0002.resumed.json is damaged" in view.damage[0]
    assert valid(run) == [two, one]


def test_damaged_record_is_bridged_by_its_other_commit(run: MadeRun) -> None:
    """One damaged commit of the attempt is no obstacle where another can be read, nor is a file
    that is none of ours.
    """
    one = run.begin().save(10)
    second = run.begin()
    two, three = second.save(20), second.save(30)
    run.damage(run.layout.resumed(2))
    run.damage(run.layout.commit(two))
    run.store.put(f"{run.layout.commits}notes.txt", b"")
    assert valid(run) == [three, two, one]


def test_damaged_record_is_bridged_by_a_later_attempt(run: MadeRun) -> None:
    """A later record holds the chain, so a damaged one in the middle breaks nothing."""
    one = run.begin().save(10)
    two = run.begin().save(20)
    run.begin()
    run.damage(run.layout.resumed(2))
    run.damage(run.layout.commit(two))
    assert valid(run) == [two, one]


def test_damaged_record_of_an_attempt_without_commits(run: MadeRun) -> None:
    """It committed nothing, so passing it over loses nothing."""
    one = run.begin().save(10)
    run.begin()
    run.damage(run.layout.resumed(2))
    view = read_attempts(run.store, run.layout)[1]
    assert view.resumed is None
    assert view.damage
    assert valid(run) == [one]


def test_damaged_claim_keeps_its_resumed_record(run: MadeRun) -> None:
    """The two records are read each for itself."""
    one = run.begin().save(10)
    run.damage(run.layout.attempt(1))
    (view,) = read_attempts(run.store, run.layout)
    assert view.claim is None
    assert view.resumed is not None
    assert valid(run) == [one]


def test_many_attempts_are_read_at_once() -> None:
    """A run that was preempted often is not read record after record; the order stays."""
    run = MadeRun()
    for number in range(1, 9):
        run.put_claim(number)
    both = threading.Barrier(2, timeout=60)

    def wait_for_another(operation: str, path: str) -> None:
        if operation == "read":
            both.wait()

    views = read_attempts(HookedStore(run.store, wait_for_another), run.layout)
    assert [view.number for view in views] == list(range(1, 9))
    assert all(view.claim is not None for view in views)


@pytest.mark.parametrize("commit", ["own", "of another attempt"])
def test_a_record_of_another_attempt_leads_nowhere(run: MadeRun, commit: str) -> None:
    """Put under this one's name, it would lead round in a circle; with a commit that is put under
    this one's name as well, nothing tells what the attempt started from.
    """
    first = run.begin()
    one = first.save(10)
    second = run.begin()
    two = second.save(20)
    path, commit_path = run.layout.resumed(2), run.layout.commit(two)
    circle = [LineageEntry(attempt=5, resumed_from=str(two))]
    resumed = decode(run.store.read(path), ResumedRecord, path=path)
    forged = msgspec.structs.replace(resumed, attempt=5, checkpoint=str(two), lineage=circle)
    run.store.put(path, encode(forged))
    if commit != "own":
        record = run.record(two)
        forgery = msgspec.structs.replace(record, id="step-00000020-a5-s1", lineage=circle)
        run.store.put(commit_path, encode(forgery))
    (_, view) = read_attempts(run.store, run.layout)
    assert view.damage == (f"{path} is of attempt 5, not 2",)
    assert valid(run) == ([two, one] if commit == "own" else [one])


def test_a_claim_of_another_attempt_is_damage(run: MadeRun) -> None:
    """Who executes the attempt is not known then."""
    run.begin()
    path = run.layout.attempt(1)
    claim = decode(run.store.read(path), AttemptClaim, path=path)
    run.store.put(path, encode(msgspec.structs.replace(claim, attempt=2)))
    (view,) = read_attempts(run.store, run.layout)
    assert (view.claim, view.damage) == (None, (f"{path} is of attempt 2, not 1",))
