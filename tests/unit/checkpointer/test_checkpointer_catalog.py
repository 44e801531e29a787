"""What a store says about its runs; and marks."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from support.made_runs import MadeRun, memory_store

from ckpt_tasks.checkpointer.catalog import (
    CheckpointView,
    is_complete,
    list_checkpoints,
    list_run_names,
    list_runs,
    view_run,
)
from ckpt_tasks.checkpointer.marks import (
    mark,
    marked,
    read_completed,
    read_mark,
    write_completed,
)
from ckpt_tasks.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError
from ckpt_tasks.format.digest import digest
from ckpt_tasks.format.layout import MARK_KINDS, MarkKind
from ckpt_tasks.format.records import CompletedRecord, now
from ckpt_tasks.store.local import LocalStore
from ckpt_tasks.types import CheckpointId, Position


@pytest.fixture
def run() -> MadeRun:
    return MadeRun()


def view_of(run: MadeRun, checkpoint: CheckpointId) -> CheckpointView:
    views = {view.id: view for view in view_run(run.store, run.name).checkpoints}
    return views[str(checkpoint)]


def completed(run: MadeRun, attempt: int) -> CompletedRecord:
    return CompletedRecord(
        uid=run.identity.uid,
        attempt=attempt,
        checkpoint=None,
        position=Position(step=10, phase="epoch_done"),
        completed_at=now(),
    )


def test_valid(run: MadeRun) -> None:
    """A checkpoint on the lineage is valid, with its record and without a reason."""
    checkpoint = run.begin().save(10)
    view = view_of(run, checkpoint)
    assert (view.standing, view.why, view.pinned) == ("valid", None, False)
    assert view.record == run.record(checkpoint)


def test_zombie(run: MadeRun) -> None:
    """One beyond what a later attempt resumed from."""
    first = run.begin()
    start, beyond = first.save(10), first.save(20)
    run.begin("flow-run-2", resume=str(start))
    assert view_of(run, start).standing == "valid"
    assert view_of(run, beyond).standing == "zombie"


def test_unhealthy(run: MadeRun) -> None:
    """One with non-finite parameters; the reason names them."""
    view = view_of(run, run.begin().save(10, nonfinite=["model.weight"]))
    assert (view.standing, view.why) == ("unhealthy", "NaN or infinity in model.weight")


@pytest.mark.parametrize(
    ("kind", "standing", "why"),
    [
        ("expired", "expired", "no longer kept"),
        ("collecting", "expired", "no longer kept"),
        ("quarantined", "quarantined", "chunk 3 is wrong"),
    ],
)
def test_marked(run: MadeRun, kind: MarkKind, standing: str, why: str) -> None:
    """A mark decides the standing; a quarantine's says why."""
    checkpoint = run.begin().save(10)
    mark(run.store, run.layout, kind, checkpoint, why="chunk 3 is wrong", by="a test")
    view = view_of(run, checkpoint)
    assert (view.standing, view.why) == (standing, why)
    assert view_run(run.store, run.name).newest is None


def test_quarantine_with_an_unreadable_reason(run: MadeRun) -> None:
    """The mark's existence counts, its content is for people."""
    checkpoint = run.begin().save(10)
    run.store.put(run.layout.mark("quarantined", checkpoint), b"scribble")
    view = view_of(run, checkpoint)
    assert (view.standing, view.why) == ("quarantined", "found damaged")


def test_damaged_record(run: MadeRun) -> None:
    """One whose record cannot be read stays in the list, with the reason."""
    first = run.begin()
    older, damaged = first.save(10), first.save(20)
    run.damage(run.layout.commit(damaged))
    view = view_of(run, damaged)
    assert (view.standing, view.record) == ("damaged", None)
    assert view.why is not None
    assert run.layout.commit(damaged) in view.why
    assert view_of(run, older).standing == "valid"


def test_pinned(run: MadeRun) -> None:
    """A pin is told beside the standing."""
    first = run.begin()
    pinned, other = first.save(10), first.save(20)
    mark(run.store, run.layout, "pins", pinned, why="a test", by="a test")
    assert (view_of(run, pinned).pinned, view_of(run, other).pinned) == (True, False)


def test_newest_first(run: MadeRun) -> None:
    """Checkpoints are ordered by attempt and sequence, not by step; newest is the first valid."""
    first = run.begin()
    start = first.save(10)
    first.save(90)
    second = run.begin("flow-run-2", resume=str(start))
    newest = second.save(20)
    unhealthy = second.save(30, nonfinite=["w"])
    view = view_run(run.store, run.name)
    assert [c.id for c in view.checkpoints][:2] == [str(unhealthy), str(newest)]
    assert view.newest is not None
    assert view.newest.id == str(newest)


def test_unknown_run() -> None:
    """A run that is not there is not found."""
    with pytest.raises(CheckpointNotFoundError, match="no run 'digits'"):
        view_run(memory_store(), "digits")


def test_damaged_identity(run: MadeRun) -> None:
    """A damaged run.json is a matter for people; the message says what to do."""
    run.damage(run.layout.run_record)
    with pytest.raises(ConfigError, match=r"restore run\.json from a copy"):
        view_run(run.store, run.name)


def test_foreign_files_are_no_checkpoints(run: MadeRun) -> None:
    """What people leave among the commits is not listed."""
    checkpoint = run.begin().save(10)
    for name in ("notes.txt", "step-1-a1-s1.json", f"{checkpoint}.json.bak", "old/x.json"):
        run.store.put(f"{run.layout.commits}{name}", b"{}")
    assert list_checkpoints(run.store, run.layout) == [checkpoint]


def test_complete_run(run: MadeRun) -> None:
    """The marker shows in the view, until a later attempt trains."""
    run.begin().save(10)
    write_completed(run.store, run.layout, completed(run, 1))
    assert view_run(run.store, run.name).completed is not None
    run.claim()
    assert view_run(run.store, run.name).completed is not None
    run.begin()
    view = view_run(run.store, run.name)
    assert view.completed is None
    assert not is_complete(completed(run, 1), view.attempts)


def test_damaged_completion_marker(run: MadeRun) -> None:
    """It is read as damage, and the run counts as not complete."""
    run.begin()
    write_completed(run.store, run.layout, completed(run, 1))
    run.damage(run.layout.completed)
    with pytest.raises(CorruptCheckpointError):
        read_completed(run.store, run.layout)
    assert view_run(run.store, run.name).completed is None


def test_later_completion_replaces_an_earlier_one(run: MadeRun) -> None:
    """The marker tells of the last attempt that completed the run."""
    assert read_completed(run.store, run.layout) is None
    write_completed(run.store, run.layout, completed(run, 1))
    write_completed(run.store, run.layout, completed(run, 2))
    found = read_completed(run.store, run.layout)
    assert found is not None
    assert found.attempt == 2


def test_list_runs() -> None:
    """Every run of the store by name, with counts and its newest checkpoint."""
    store = memory_store()
    digits = MadeRun(store, "digits/cnn é")
    digits.begin().save(10)
    newest = digits.begin().save(20)
    MadeRun(store, "empty")
    names = {summary.name: summary for summary in list_runs(store)}
    assert set(names) == {"digits/cnn é", "empty"}
    summary = names["digits/cnn é"]
    assert (summary.attempts, summary.checkpoints, summary.newest) == (2, 2, str(newest))
    assert (summary.completed, summary.problem) == (False, None)
    assert summary.created_at == digits.identity.created_at
    assert (names["empty"].attempts, names["empty"].newest) == (0, None)


def test_list_runs_with_damage_and_foreign_folders() -> None:
    """A damaged run and a folder that is none are listed with their problem; others as ever."""
    store = memory_store()
    damaged = MadeRun(store, "damaged")
    damaged.damage(damaged.layout.run_record)
    good = MadeRun(store, "good")
    good.begin().save(10)
    store.put("holiday photos/one.jpg", b"jpg")
    store.put("plain/readme.txt", b"text")
    store.put(".cache/x", b"x")
    runs = {summary.name: summary for summary in list_runs(store)}
    assert set(runs) == {"damaged", "good", "holiday photos", "plain"}
    assert runs["good"].problem is None
    assert "cannot be identified" in (runs["damaged"].problem or "")
    assert "not an encoded name" in (runs["holiday photos"].problem or "")
    assert "no run 'plain'" in (runs["plain"].problem or "")


def test_list_runs_of_a_newer_version() -> None:
    """A run whose attempts this version cannot read hides no other run."""
    store = memory_store()
    MadeRun(store, "good").begin()
    newer = MadeRun(store, "newer")
    body = b'{"format": 2'
    seal = b',\n "checksum": "%s"\n}\n' % digest(body).encode("ascii")
    store.put(newer.layout.attempt(1), body + seal)
    runs = {summary.name: summary for summary in list_runs(store)}
    assert runs["good"].attempts == 1
    assert "upgrade ckpt-tasks" in (runs["newer"].problem or "")


def test_renamed_run_folder() -> None:
    """A folder that was renamed is told apart from the run that it holds."""
    store = memory_store()
    original = MadeRun(store, "original")
    store.put("renamed/run.json", store.read(original.layout.run_record))
    runs = {summary.name: summary for summary in list_runs(store)}
    assert "was the folder renamed?" in (runs["renamed"].problem or "")


# -- marks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MARK_KINDS)
def test_mark_is_kept_as_first_made(run: MadeRun, kind: MarkKind) -> None:
    """A second mark of the kind changes nothing, and it is listed under its kind alone."""
    checkpoint = CheckpointId(10, 1, 1)
    assert read_mark(run.store, run.layout, kind, checkpoint) is None
    mark(run.store, run.layout, kind, checkpoint, why="first", by="one")
    mark(run.store, run.layout, kind, checkpoint, why="second", by="two")
    found = read_mark(run.store, run.layout, kind, checkpoint)
    assert found is not None
    assert (found.checkpoint, found.why, found.by) == (str(checkpoint), "first", "one")
    marks = marked(run.store, run.layout)
    assert marks == {k: {checkpoint} if k == kind else set() for k in MARK_KINDS}


def test_long_reason(run: MadeRun) -> None:
    """A reason that is longer than a record may hold is cut, not refused."""
    checkpoint = CheckpointId(10, 1, 1)
    mark(run.store, run.layout, "quarantined", checkpoint, why="x" * 10_000, by="a test")
    found = read_mark(run.store, run.layout, "quarantined", checkpoint)
    assert found is not None
    assert found.why == "x" * 4000


def test_a_folder_whose_name_is_no_text_hides_no_run(tmp_path: Path) -> None:
    """Whoever has made it: the list can be written, as JSON too, and shows the others."""
    run = MadeRun(LocalStore(str(tmp_path)))
    os.mkdir(bytes(tmp_path) + b"/\xff")
    (tmp_path / os.fsdecode(b"\xff") / "x").touch()
    names = [summary.name for summary in list_runs(run.store)]
    assert msgspec.json.decode(msgspec.json.encode(list_runs(run.store)))[1]["problem"]
    assert names == list_run_names(run.store) == [run.name, "\\udcff"]
