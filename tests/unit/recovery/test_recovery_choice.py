"""Which checkpoint an attempt starts from: one rule a test."""

from __future__ import annotations

import pytest
from support.made_runs import MadeRun

from ckpt_tasks.checkpointer.marks import mark
from ckpt_tasks.errors import CheckpointNotFoundError, ConfigError
from ckpt_tasks.format.layout import MarkKind


@pytest.fixture
def run() -> MadeRun:
    return MadeRun()


def test_first_attempt_starts_at_the_beginning(run: MadeRun) -> None:
    """Nothing was committed, so nothing is resumed, and the record says that it is the first."""
    first = run.begin()
    assert first.recovered.checkpoint is None
    assert first.recovered.resumed.why == "the first attempt"


def test_earlier_attempts_without_a_commit(run: MadeRun) -> None:
    """Attempts that committed nothing leave the beginning as the start."""
    run.begin()
    second = run.begin()
    assert second.start is None
    assert second.recovered.resumed.why == "no earlier attempt committed a checkpoint"


def test_newest_is_taken(run: MadeRun) -> None:
    """The newest commit of the newest attempt wins, also over one that lies at a later step."""
    first = run.begin()
    start = first.save(10)
    run.begin("flow-run-2", resume=str(first.save(90)))
    second = run.begin("flow-run-3", resume=str(start))
    newest = second.save(20)
    assert run.begin("flow-run-3").start == str(newest)


def test_zombies_commit_is_never_taken(run: MadeRun) -> None:
    """What an attempt committed beyond the place from which a later one resumed is not used."""
    first = run.begin()
    start = first.save(10)
    zombie = first.save(20)
    run.begin("flow-run-2", resume=str(start))
    third = run.begin("flow-run-2")
    assert third.start == str(start)
    assert str(zombie) not in [entry.resumed_from for entry in third.recovered.resumed.lineage]


def test_attempt_that_never_resumed_changes_nothing(run: MadeRun) -> None:
    """A claim without a resumed record leaves what the attempt before it committed valid."""
    newest = run.begin().save(10)
    run.claim()
    assert run.begin().start == str(newest)


def test_unhealthy_checkpoint_is_passed_over(run: MadeRun) -> None:
    """One with non-finite parameters is not started from; the record names them."""
    first = run.begin()
    healthy = first.save(10)
    unhealthy = first.save(20, nonfinite=["model.weight"])
    second = run.begin()
    assert second.start == str(healthy)
    (passed,) = second.recovered.resumed.passed_over
    assert passed.checkpoint == str(unhealthy)
    assert "model.weight" in passed.why


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("expired", "expired"), ("collecting", "expired"), ("quarantined", "quarantined")],
)
def test_marked_checkpoint_is_passed_over(run: MadeRun, kind: MarkKind, reason: str) -> None:
    """One that is no longer kept, being removed or known as damaged is not started from."""
    first = run.begin()
    kept = first.save(10)
    marked = first.save(20)
    mark(run.store, run.layout, kind, marked, why="a test", by="a test")
    second = run.begin()
    assert second.start == str(kept)
    (passed,) = second.recovered.resumed.passed_over
    assert passed.checkpoint == str(marked)
    assert passed.why.startswith(reason)


def test_pinned_checkpoint_is_an_ordinary_one(run: MadeRun) -> None:
    """A pin keeps a checkpoint; it neither prefers nor excludes it."""
    first = run.begin()
    pinned = first.save(10)
    newest = first.save(20)
    mark(run.store, run.layout, "pins", pinned, why="a test", by="a test")
    assert run.begin().start == str(newest)


def test_only_newer_ones_are_recorded_as_passed_over(run: MadeRun) -> None:
    """An older checkpoint that would not be used either is not worth a word."""
    first = run.begin()
    old = first.save(10)
    first.save(20)
    mark(run.store, run.layout, "expired", old, why="a test", by="a test")
    assert run.begin().recovered.resumed.passed_over == []


def _fail_from_the_newest(run: MadeRun, times: int = 3) -> list[str | None]:
    """Attempts that all fail at step 31 in one way; returns where they started."""
    starts = []
    for _ in range(times):
        attempt = run.begin()
        run.fail(attempt.number, step=31)
        starts.append(attempt.start)
    return starts


def test_same_failure_falls_back_once(run: MadeRun) -> None:
    """After three attempts that failed in the same way at one step, the next older checkpoint is
    tried, with the failure as the reason; an attempt that dies there unheard of steps back no
    further.
    """
    first = run.begin()
    first.save(10)
    middle = first.save(20)
    deadly = first.save(30)
    assert _fail_from_the_newest(run) == [str(deadly)] * 3
    fourth = run.begin()
    assert fourth.start == str(middle)
    (passed,) = fourth.recovered.resumed.passed_over
    assert passed.checkpoint == str(deadly)
    assert passed.why == "3 attempts ended at step 31 with ValueError: bad"
    assert [run.begin().start for _ in range(4)] == [str(middle)] * 4
    for _ in range(4):
        assert run.begin("flow-run-2").start == str(middle)


def test_deaths_of_which_nothing_is_known_never_fall_back(run: MadeRun) -> None:
    """However many machines are lost from one checkpoint: its work is not thrown away."""
    first = run.begin()
    first.save(10)
    newest = first.save(20)
    assert [run.begin().start for _ in range(6)] == [str(newest)] * 6


@pytest.mark.parametrize("differing", ["kind", "step"])
def test_different_failures_never_fall_back(run: MadeRun, differing: str) -> None:
    """Failures of other kinds, or at other steps, are no sign that the checkpoint is at fault."""
    first = run.begin()
    first.save(10)
    newest = first.save(20)
    for number in range(6):
        attempt = run.begin()
        assert attempt.start == str(newest)
        if differing == "kind":
            run.fail(attempt.number, f"ValueError: {number}", step=25)
        else:
            run.fail(attempt.number, step=25 + number)


def test_new_invocation_starts_from_the_newest(run: MadeRun) -> None:
    """Who starts the run anew has mended the cause: nothing is passed over for the past."""
    first = run.begin()
    first.save(10)
    newest = first.save(20)
    _fail_from_the_newest(run)
    assert run.begin("flow-run-2").start == str(newest)


def test_progress_forgives_failures(run: MadeRun) -> None:
    """Failures at a step that the run got past since do not count."""
    run.begin().save(10)
    _fail_from_the_newest(run, 2)
    newest = run.begin().save(40)
    assert _fail_from_the_newest(run, 2) == [str(newest)] * 2
    assert run.begin().start == str(newest)


def test_only_checkpoint_is_tried_again_although_deadly(run: MadeRun) -> None:
    """Where there is no older one, the deadly one stays the start."""
    only = run.begin().save(10)
    assert _fail_from_the_newest(run, 5) == [str(only)] * 5


def test_damage_where_nothing_was_committed_costs_nothing(run: MadeRun) -> None:
    """There is nothing that could be the run's own: it begins, as it did before."""
    run.begin()
    run.damage(run.layout.resumed(1))
    assert run.begin().start is None


def test_checkpoint_asked_for_by_id(run: MadeRun) -> None:
    """An id is obeyed although newer ones exist; the rest becomes a zombie's."""
    first = run.begin()
    wanted = first.save(10)
    first.save(20)
    second = run.begin("flow-run-2", resume=str(wanted))
    assert second.start == str(wanted)
    assert second.recovered.resumed.why == "this checkpoint was asked for"


def test_zombies_checkpoint_asked_for_by_id(run: MadeRun) -> None:
    """A person may go back to a zombie's checkpoint, and the lineage goes on from there."""
    first = run.begin()
    start = first.save(10)
    zombie = first.save(20)
    run.begin("flow-run-2", resume=str(start)).save(15)
    third = run.begin("flow-run-3", resume=str(zombie))
    newest = third.save(30)
    assert third.start == str(zombie)
    assert run.begin("flow-run-3").start == str(newest)


def test_unhealthy_checkpoint_asked_for_by_id(run: MadeRun) -> None:
    """A person may ask for what no retry would take."""
    unhealthy = run.begin().save(10, nonfinite=["model.weight"])
    assert run.begin("flow-run-2", resume=str(unhealthy)).start == str(unhealthy)


@pytest.mark.parametrize("resume", ["fresh", "id"])
def test_request_binds_the_first_attempt_that_trains(run: MadeRun, resume: str) -> None:
    """The orchestrator repeats its words on every retry; only the first that trains obeys."""
    first = run.begin()
    asked = first.save(10)
    first.save(20)
    wanted = str(asked) if resume == "id" else "fresh"
    start = str(asked) if resume == "id" else None
    run.claim("flow-run-2", resume=wanted)  # died before it could train
    second = run.begin("flow-run-2", resume=wanted)
    assert second.start == start
    newest = second.save(11)
    assert run.begin("flow-run-2", resume=wanted).start == str(newest)
    assert run.begin("flow-run-3", resume=wanted).start == start


def test_retry_after_a_fresh_start_without_a_commit(run: MadeRun) -> None:
    """It starts at the beginning again, not from what was given up."""
    run.begin().save(10)
    run.begin("flow-run-2", resume="fresh")
    assert run.begin("flow-run-2", resume="fresh").start is None


def test_unknown_id(run: MadeRun) -> None:
    """An id that was never committed is not replaced by another one."""
    run.begin().save(10)
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint step-00000099-a1-s9"):
        run.begin("flow-run-2", resume="step-00000099-a1-s9")


def test_malformed_id(run: MadeRun) -> None:
    """Anything but auto, fresh and an id is a mistake of configuration."""
    with pytest.raises(ConfigError, match=r"'newest' is not a checkpoint id"):
        run.begin(resume="newest")


def test_nothing_restorable(run: MadeRun) -> None:
    """A run whose checkpoints are all excluded ends with outcome 4, and says why for each."""
    checkpoint = run.begin().save(10)
    mark(run.store, run.layout, "collecting", checkpoint, why="a test", by="a test")
    with pytest.raises(CheckpointNotFoundError, match=rf"{checkpoint}: expired") as caught:
        run.begin()
    assert caught.value.exit_code == 4


def test_expired_ones_are_the_last_resort(run: MadeRun) -> None:
    """Where every other is damaged, one that has expired and is still there is better than none."""
    first = run.begin()
    expired, damaged = first.save(10), first.save(20)
    mark(run.store, run.layout, "expired", expired, why="a test", by="a test")
    run.damage_tensors(str(damaged))
    assert run.begin().start == str(expired)


def test_what_is_damaged_or_being_removed_is_no_resort(run: MadeRun) -> None:
    """Where all have expired, it is one whose bytes nobody removes, or has found damaged."""
    first = run.begin()
    expired, collecting, quarantined = first.save(10), first.save(20), first.save(30)
    for checkpoint in (expired, collecting, quarantined):
        mark(run.store, run.layout, "expired", checkpoint, why="a test", by="a test")
    mark(run.store, run.layout, "collecting", collecting, why="a test", by="a test")
    mark(run.store, run.layout, "quarantined", quarantined, why="a test", by="a test")
    assert run.begin().start == str(expired)


def test_one_that_is_being_collected_cannot_be_asked_for(run: MadeRun) -> None:
    """Its bytes may be gone at any moment; one that has only expired may be asked for."""
    first = run.begin()
    asked, _ = first.save(10), first.save(20)
    mark(run.store, run.layout, "expired", asked, why="a test", by="a test")
    assert run.begin("flow-run-2", resume=str(asked)).start == str(asked)
    mark(run.store, run.layout, "collecting", asked, why="a test", by="a test")
    with pytest.raises(CheckpointNotFoundError, match="is being collected"):
        run.begin("flow-run-3", resume=str(asked))


def test_lineage_whose_start_is_gone_never_starts_again_at_step_0(run: MadeRun) -> None:
    """The only checkpoint that an attempt went on from was deleted by hand: outcome 4."""
    start = run.begin().save(10)
    run.begin()
    run.store.delete(run.layout.commit(start))
    with pytest.raises(CheckpointNotFoundError, match=rf"went on from {start}, which is gone"):
        run.begin()


def test_unreadable_lineage_never_starts_again_at_step_0(run: MadeRun) -> None:
    """Where no record tells which checkpoints are the run's own, it is outcome 4."""
    checkpoint = run.begin().save(10)
    run.damage(run.layout.resumed(1))
    run.damage(run.layout.commit(checkpoint))
    with pytest.raises(CheckpointNotFoundError, match="which of them are its own cannot be told"):
        run.begin()
