"""What must hold of a run in a store, whatever happened to the attempts that made it."""

from __future__ import annotations

from pathlib import Path

from ckpt_tasks.checkpointer.catalog import list_checkpoints, view_run
from ckpt_tasks.checkpointer.reader import read_commit, read_index
from ckpt_tasks.checkpointer.verify import verify_checkpoint
from ckpt_tasks.fencing.attempts import read_attempts
from ckpt_tasks.fencing.lineage import trace_lineage
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.store import Store, open_store
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import CheckpointId, Number


def check_run(
    spec: TrainSpec,
    *,
    steps: int | None = None,
    retained: bool = False,
    may_come_late: bool = False,
) -> list[CheckpointId]:
    """Assert every invariant of the run; returns its valid checkpoints, oldest first.

    Parameters
    ----------
    steps
        The run is complete and trained exactly those: each of them once on the final lineage.
    retained
        Some checkpoints are gone: which steps were trained, and what attempts started from, is
        not known.
    may_come_late
        An attempt that stalled in a commit, or whose writer outlived it, may have committed after
        the next one had looked.
    """
    with open_store(spec.config.store) as store:
        layout = RunLayout(spec.run)
        view = view_run(store, spec.run)
        assert [a.number for a in view.attempts] == list(range(1, len(view.attempts) + 1))
        for checkpoint in view.checkpoints:
            report = verify_checkpoint(store, spec.run, checkpoint.id)
            assert report.ok, f"committed without its data: {report.problem}"
        if not (retained or may_come_late):
            _check_starts(store, layout)
        valid = trace_lineage(view.attempts).valid(list_checkpoints(store, layout))[::-1]
        resumed = {a.number: a.resumed for a in view.attempts}
        for checkpoint in valid:
            record = read_commit(store, layout, checkpoint, run=view.run)
            start = resumed[checkpoint.attempt]
            assert start is not None
            assert record.lineage == start.lineage
        if steps is not None:
            assert view.completed is not None
            assert view.completed.position.step == steps
            assert retained or _trained_steps(store, layout) == list(range(1, steps + 1))
    return valid


def _check_starts(store: Store, layout: RunLayout) -> None:
    """Each attempt started from the newest checkpoint that stood when it was claimed."""
    attempts = read_attempts(store, layout)
    committed = list_checkpoints(store, layout)
    for attempt in attempts:
        if attempt.resumed is None:
            continue
        earlier = [a for a in attempts if a.number < attempt.number]
        before = [c for c in committed if c.attempt < attempt.number]
        newest = next(iter(trace_lineage(earlier).valid(before)), None)
        assert attempt.resumed.checkpoint == (str(newest) if newest else None)


def trained_steps(spec: TrainSpec) -> list[int]:
    """The steps whose loss the final lineage holds, as its checkpoints' journals tell."""
    with open_store(spec.config.store) as store:
        return _trained_steps(store, RunLayout(spec.run))


def _trained_steps(store: Store, layout: RunLayout) -> list[int]:
    attempts = read_attempts(store, layout)
    valid = trace_lineage(attempts).valid(list_checkpoints(store, layout))[::-1]
    steps: list[int] = []
    before: list[tuple[str, Number, int, int]] = []
    for checkpoint in valid:
        record = read_commit(store, layout, checkpoint)
        rows = read_index(store, layout, record.indexes[0]).metrics
        # Its writer died right behind the commit: the save was repeated, or, with several ranks,
        # the next one followed, and has these rows, too.
        again = len(before) if rows[: len(before)] == before else 0
        steps += [step for key, _, step, _ in rows[again:] if key == "loss"]
        before = rows
    return steps


def leftovers(spec: TrainSpec) -> set[str]:
    """Data objects that no checkpoint names."""
    with open_store(spec.config.store) as store:
        return leftovers_of(store, RunLayout(spec.run))


def leftovers_of(store: Store, layout: RunLayout) -> set[str]:
    """As `leftovers`, in a store that is open."""
    named: set[str] = set()
    for checkpoint in list_checkpoints(store, layout):
        record = read_commit(store, layout, checkpoint)
        for ref in record.indexes:
            named.add(layout.in_run(ref.path))
            named |= {layout.in_run(f.path) for f in read_index(store, layout, ref).files}
    return {info.path for info in store.list_objects(layout.data)} - named


def temporary_files(folder: Path) -> list[Path]:
    """Half-written files below a local store's root: whatever no listing shows."""
    with open_store(str(folder)) as store:
        shown = {info.path for info in store.list_objects("")}
    return [
        path
        for path in folder.rglob("*")
        if path.is_file() and str(path.relative_to(folder)) not in shown
    ]
