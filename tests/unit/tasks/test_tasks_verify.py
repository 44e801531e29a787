"""What was verified is marked, and collections count on it."""

from __future__ import annotations

from support.made_runs import HookedStore
from support.retained_runs import GRACE, RetainedRun, state_of

from ckpt_tasks.checkpointer.catalog import view_run
from ckpt_tasks.checkpointer.marks import marked
from ckpt_tasks.errors import StoreError
from ckpt_tasks.tasks.verify import verify_and_mark


def test_collection_does_not_read_again_what_was_verified() -> None:
    """A mark says that it was read as a whole: no byte of it is, before an older one goes."""
    run = RetainedRun()
    attempt = run.begin()
    old, new = (attempt.save(step, state_of(step, frozen=step)) for step in (1, 2))
    run.expire(latest=1)
    run.aged.age(2 * GRACE)
    view = view_run(run.store, run.name)

    def no_marks(operation: str, path: str) -> None:
        if operation == "create":
            raise StoreError("read-only")

    reading = HookedStore(run.store, no_marks)
    assert verify_and_mark(reading, view, str(new)).unmarked == "read-only"
    assert marked(run.store, run.layout)["verified"] == set()
    report = verify_and_mark(run.store, view, str(new))
    assert (report.ok, report.unmarked) == (True, None)

    read: list[str] = []
    noting = HookedStore(run.store, lambda operation, path: read.append(path))
    done = run.collect(through=noting)
    assert (done.removed, done.verified) == ([str(old)], str(new))
    assert run.tensors_path(new) not in read


def test_what_is_damaged_or_gone_is_not_marked() -> None:
    """Nor does a mark stay of what was collected meanwhile."""
    run = RetainedRun()
    attempt = run.begin()
    gone, damaged = (attempt.save(step, state_of(step, frozen=step)) for step in (1, 2))
    view = view_run(run.store, run.name)
    run.damage_tensors(str(damaged))
    assert not verify_and_mark(run.store, view, str(damaged)).ok

    def collected(operation: str, path: str) -> None:
        if operation == "create":
            run.store.delete(run.layout.commit(gone))

    assert verify_and_mark(HookedStore(run.store, collected), view, str(gone)).ok
    assert marked(run.store, run.layout)["verified"] == set()
