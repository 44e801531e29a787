"""However a training is written, and wherever it is killed, it goes on as if it had not been."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from support.resume_harness import EVERYWHERE, NOWHERE, Harness, Kill, Recording, Training
from support.resume_loaders import LOADERS, WORKER_LOADERS, ordinary
from support.resume_loops import LOOPS

CASES: dict[str, Training] = {
    **{f"over {name}": ordinary(make) for name, make in LOADERS.items()},
    **{
        f"leaving {name}": ordinary(LOADERS[name], leave_early=True)
        for name in ("stateful", "stateful, iterable", "plain", "plain, weighted, own generator")
    },
    **LOOPS,
}
WITH_WORKERS: dict[str, Training] = {
    **{f"over {name}": ordinary(make, epochs=2) for name, make in WORKER_LOADERS.items()},
    **{
        f"leaving {name}": ordinary(WORKER_LOADERS[name], leave_early=True, epochs=2)
        for name in ("stateful, 2 persistent workers", "plain, 2 persistent workers")
    },
}
SAMPLED = {"leaving stateful, 2 persistent workers"}
"""Each start of workers takes seconds."""

KILLS: dict[str, Callable[[], Kill]] = {
    "committed": lambda: Kill(committed=1),
    "first place": lambda: Kill(place=1),
    "second place": lambda: Kill(place=2),
    "fourth place": lambda: Kill(place=4),
    "saving": lambda: Kill(saving=2),
}


@cache
def uninterrupted(case: str) -> Recording:
    return Harness({**CASES, **WITH_WORKERS}[case], NOWHERE).attempt()


def assert_same(found: Recording, case: str) -> None:
    expected = uninterrupted(case)
    assert found.outcome is not None
    assert found.outcome.done
    assert found.places == expected.places
    assert found.rows == expected.rows
    assert found.digest == expected.digest


@pytest.mark.parametrize("case", CASES)
def test_saving_at_every_boundary_changes_nothing(case: str) -> None:
    """Random numbers, batches, metrics and the final state are those of a run without saves."""
    recording = Harness(CASES[case]).attempt()
    assert recording.cuts
    assert_same(recording, case)


@pytest.mark.parametrize("kill", KILLS)
@pytest.mark.parametrize("case", CASES)
def test_killed_again_and_again(case: str, kill: str) -> None:
    """Killed at that place behind every checkpoint, the pieces add up to the whole."""
    whole, attempts = Harness(CASES[case]).in_pieces(KILLS[kill])
    assert attempts > 1
    assert_same(whole, case)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if case in SAMPLED else pytest.mark.exhaustive)
        for case in WITH_WORKERS
    ],
)
def test_killed_with_workers(case: str) -> None:
    """The same with data loaded, and augmented at random, by worker processes."""
    recording = Harness(WITH_WORKERS[case], EVERYWHERE).attempt()
    assert_same(recording, case)
    whole, _ = Harness(WITH_WORKERS[case]).in_pieces(lambda: Kill(committed=3))
    assert_same(whole, case)
