"""The run's story, as people read it in the registry: attempts, kills, resumes, and why."""

from __future__ import annotations

import pytest
from support.made_runs import MadeAttempt, MadeRun
from support.replays import DIVERGED, IDENTICAL

from ckpt_tasks.checkpointer.marks import mark
from ckpt_tasks.config import RegistryConfig
from ckpt_tasks.fencing.attempts import read_attempts
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.format.codec import encode
from ckpt_tasks.format.records import AttemptClaim, Heartbeat, now
from ckpt_tasks.registry.base import RunDescription
from ckpt_tasks.testing import MemoryRegistry, RegistryMemory
from ckpt_tasks.training.registration.publisher import Publisher
from ckpt_tasks.training.registration.story import read_replays, tell_replays, tell_story

HEAD = [
    "| attempt | began | started from | checkpoints | why | ended |",
    "|---|---|---|---|---|---|",
]


@pytest.fixture
def run() -> MadeRun:
    """A run in memory."""
    return MadeRun()


def _began(attempt: MadeAttempt) -> str:
    claim: AttemptClaim = attempt.attempt.claim
    return claim.claimed_at


def _story(run: MadeRun) -> list[str]:
    return tell_story(run.store, run.layout).splitlines()


def _rows(run: MadeRun) -> list[str]:
    return [line for line in _story(run) if line.startswith("| ")][1:]


def test_a_kill_a_resume_and_a_quarantine(run: MadeRun) -> None:
    """Each attempt has its row: what it started from, how many checkpoints it made, why, how it
    ended; a damaged checkpoint is named, with the damage.
    """
    first = run.begin()
    first.save(10)
    kept = first.save(20)
    run.fail(first.number, "SIGKILL", step=24)
    second = run.begin()
    damaged = second.save(30)
    run.damage(run.tensors_path(damaged))
    third = run.begin()  # the machine of the second was lost
    newest = third.save(40)
    story = _story(run)
    assert story[:5] == [
        f"**Training run `digits`** in `{run.store.url}`",
        "",
        f"Newest checkpoint: `{newest}`, {run.record(newest).position}; 3 attempts.",
        "",
        HEAD[0],
    ]
    assert story[5] == HEAD[1]
    assert story[6:8] == [
        f"| 1 | {_began(first)} | `the beginning` | 2 | the first attempt | SIGKILL, step 24 |",
        f"| 2 | {_began(second)} | `{kept}` | 1 | the newest checkpoint of the run's lineage "
        "| lost |",
    ]
    (last,) = story[8:]
    assert last.startswith(
        f"| 3 | {_began(third)} | `{kept}` | 1 | the newest usable checkpoint of the run's lineage "
        f"(1 passed over); not `{damaged}`: "
    )
    assert "chunk 0 of tensor 'weight'" in last
    assert last.endswith(" |  |")  # under way


def test_an_attempt_that_found_it_quarantined(run: MadeRun) -> None:
    """It tells so as well, though it was another one that found the damage."""
    first = run.begin()
    first.save(10)
    damaged = first.save(20)
    mark(run.store, run.layout, "quarantined", damaged, why="bits", by="a test")
    run.begin()
    assert f"not `{damaged}`: quarantined: it was found damaged |  |" in _rows(run)[1]


def test_reasons_do_not_break_the_table(run: MadeRun) -> None:
    """Bars are escaped and line breaks replaced, long reasons cut, and three of many named."""
    first = run.begin()
    first.save(1)
    for step in range(2, 7):
        first.save(step, nonfinite=["a|b\nc" + "x" * 500])
    run.begin()
    rows = _rows(run)
    assert len(rows) == 2
    assert rows[1].replace(r"\|", "").count("|") == 7
    assert "(5 passed over)" in rows[1]
    assert rows[1].count("unhealthy: NaN or infinity in a\\|b c") == 3
    assert len(rows[1]) < 1000


def test_an_attempt_that_died_before_it_trained(run: MadeRun) -> None:
    """A claim is all that there is of it; and the run has no checkpoint."""
    run.claim()
    story = _story(run)
    assert story[2] == "No checkpoint yet; 1 attempt."
    assert story[6].endswith("| never trained | 0 |  |  |")


def test_a_complete_run(run: MadeRun) -> None:
    """The first sentence is that it is complete."""
    saved = str(run.begin().save(10))
    run.complete(saved)
    assert _story(run)[2].startswith("Complete: ")
    assert _story(run)[2].endswith(", after 1 attempt.")
    assert _rows(run)[0].endswith("| complete |")


def test_a_stopped_attempt(run: MadeRun) -> None:
    """One that saved and stopped on a signal has said good-bye, and failed at nothing."""
    first = run.begin()
    first.save(10)
    beat = Heartbeat(attempt=first.number, beat=9, at=now(), ended=True)
    run.store.put(run.layout.heartbeat(first.number), encode(beat))
    run.begin()
    assert _rows(run)[0].endswith("| stopped |")


def test_the_newest_attempts_are_shown(run: MadeRun) -> None:
    """Of many attempts the first are left out; all are counted."""
    for _ in range(32):
        run.begin()
    assert [row.split()[1] for row in _rows(run)] == [str(n) for n in range(3, 33)]
    assert _story(run)[2] == "No checkpoint yet; 32 attempts."


def test_what_was_done_again(run: MadeRun) -> None:
    """Before the table, whether it came out alike; in a tag, all attempts in a few words."""
    for replay in (None, IDENTICAL, DIVERGED):
        attempt = run.begin()
        beat = Heartbeat(attempt=attempt.number, beat=1, at=now(), ended=True, replay=replay)
        run.store.put(run.layout.heartbeat(attempt.number), encode(beat))
    replays = read_replays(run.store, run.layout, read_attempts(run.store, run.layout))
    assert replays == {2: IDENTICAL, 3: DIVERGED}
    lines = tell_story(run.store, run.layout, replays).splitlines()
    assert lines[4] == (
        "**Not deterministic:** 1 of 42 steps that were done again came out differently, although "
        "the state and the order of the data were restored exactly."
    )
    assert lines[6:8] == [
        "- Attempt 2 replayed 37 steps, all identical.",
        f"- Attempt 3 {DIVERGED}.",
    ]
    assert lines[9] == HEAD[0]
    assert tell_replays(replays) == (
        "diverged: 1 of 42 steps, attempt 3; first step 8 (loss); largest difference 0.25 (loss, "
        "step 8)"
    )
    many = dict.fromkeys(range(2, 12), IDENTICAL)
    assert tell_replays(many) == "identical: 370 steps, attempts ..., 7, 8, 9, 10, 11"
    assert "Not deterministic" not in tell_story(run.store, run.layout, many)


def test_a_quarantined_checkpoint_stands_in_the_registrys_note(run: MadeRun) -> None:
    """From the first publishing of the attempt that passed it over."""
    first = run.begin()
    first.save(10)
    damaged = first.save(20)
    run.damage(run.tensors_path(damaged))
    second = run.begin()
    memory = RegistryMemory()
    Publisher(
        run.store,
        run.layout,
        Fence(run.store, run.layout, second.number),
        MemoryRegistry(memory),
        RegistryConfig(),
        RunDescription(
            run=run.name, uid=run.identity.uid, store_url=run.store.url, hyperparameters={}
        ),
        [].append,
    ).publish()
    (stored,) = memory.runs.values()
    assert stored.note == tell_story(run.store, run.layout)
    assert f"not `{damaged}`" in stored.note
