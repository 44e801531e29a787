"""The protocol of claim, choose, commit and collect, explored exhaustively as a small model.

What is promised of a stale attempt, precisely: between its second fence check and the action that
the check guards, a later attempt may claim. What it then does is late, but true: it was committed
before that claim, so every later attempt sees it in its listing and goes on from it. What begins
after that, any further commit, registration, alias or deletion, does not happen. Deletion meets
the same gap with a grace that is declared to be longer than any pause in it.
"""

from __future__ import annotations

import pytest
from protocol_explorer import explore
from protocol_state import Bounds, Rules

THREE_ATTEMPTS = Bounds(attempts=3, commits=2, damages=1, lost_answers=1)
LONG_AND_COLLECTED = Bounds(
    attempts=2, commits=2, damages=1, lost_answers=1, collectors=1, incremental=True
)
SHORT_AND_COLLECTED = Bounds(
    attempts=3, commits=1, damages=1, lost_answers=1, collectors=1, incremental=True
)


@pytest.mark.parametrize(
    ("bounds", "at_least"),
    [
        pytest.param(THREE_ATTEMPTS, 190_000, id="three attempts, two commits each"),
        pytest.param(LONG_AND_COLLECTED, 190_000, id="two attempts, two commits, a collector"),
        pytest.param(SHORT_AND_COLLECTED, 120_000, id="three attempts, one commit, a collector"),
    ],
)
def test_no_interleaving_breaks_a_promise(bounds: Bounds, at_least: int) -> None:
    """Every reachable state (some 520,000 in all) keeps every promise."""
    explored = explore(Rules(bounds))

    assert explored.violation is None, str(explored)
    assert explored.states >= at_least


PLAIN = Bounds(attempts=3, commits=2, damages=1)
LONG = Bounds(attempts=2, commits=2, damages=1, collectors=1, incremental=True)
SHORT = Bounds(attempts=3, commits=1, damages=1, collectors=1, incremental=True)


@pytest.mark.parametrize(
    ("mutant", "bounds", "broken"),
    [
        ("choose_before_claim", PLAIN, "starts at step 0 after"),
        ("lineage_read_before_claim", PLAIN, "starts at step 0 after"),
        ("attempts_listed_first", SHORT, "starts at step 0 after"),
        ("silent_restart", PLAIN, "starts at step 0 after"),
        ("commit_without_fence", PLAIN, "commits what it wrote after a later claim"),
        ("no_second_fence", PLAIN, "registers what it committed after a later claim"),
        ("adopt_before_resumed", Bounds(attempts=4, commits=1), "resumes from"),
        ("newest_timestamp", PLAIN, "resumes from"),
        ("unfenced_quarantine", SHORT, "was removed, and is quarantined"),
        ("marks_listed_last", LONG, "was removed, and is quarantined"),
        ("no_recheck", LONG, "begun after a later claim, deletes"),
        ("keeps_unverified", LONG, "no newer checkpoint was ever verified"),
        ("no_tombstone_check", LONG, "names deleted bytes"),
        ("no_grace", LONG, "which is not registered"),
    ],
)
def test_a_protocol_without_one_of_its_rules_is_caught(
    mutant: str, bounds: Bounds, broken: str
) -> None:
    """Leaving out any one rule breaks the promise it is there for, in some interleaving."""
    explored = explore(Rules(bounds, mutant=mutant))

    assert explored.violation is not None
    assert broken in explored.violation, str(explored)


def test_a_counterexample_reads_as_a_story() -> None:
    """A violation comes with the shortest way to it, one line for each step."""
    explored = explore(Rules(Bounds(attempts=2, commits=1), mutant="choose_before_claim"))

    assert explored.trace[:3] == [
        "attempt ?: lists marks",
        "attempt ?: lists commits",
        "attempt ?: lists attempts, chooses",
    ]
    assert explored.trace[-1] == "attempt 2: resumes from the start"
    assert str(explored).startswith("attempt 2 starts at step 0 after (1,)")
