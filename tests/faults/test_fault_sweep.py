"""One fault at an operation of a training: a sample of `make test-faults`, which tries them all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.attempt_forks import AttemptForks
from support.s3_servers import S3Server
from support.struck_ranks import RANKED_SCENARIOS, sweeps_of
from support.struck_runs import SCENARIOS, Place

from ckpt_tasks.testing.sweep import FATES, LOSSES, Case, sweep

Sample = Callable[..., list[Case]]


@pytest.fixture
def sample(forks: AttemptForks, root: Path) -> Sample:
    """Tries every so many-th case of a scenario, and returns how they ended."""
    root.mkdir()

    def run(scenario: str, *, every: int, server: S3Server | None = None) -> list[Case]:
        found = (SCENARIOS | RANKED_SCENARIOS)[scenario]
        sweeps = sweeps_of(forks, Place("a test", root, server), found)
        return list(
            sweep(sweeps.trial, FATES.values(), chosen=lambda number: number % every == every // 2)
        )

    return run


@pytest.mark.parametrize(
    ("scenario", "every"),
    [("save", 23), ("resume", 31), ("retention", 83), ("files", 97), ("writer", 17)],
)
def test_nothing_is_lost_whatever_fails(scenario: str, every: int, sample: Sample) -> None:
    """Whichever operation of store, registry or files fails, or the process dies or stalls at: the
    run ends bit-identical, is registered, and leaves nothing that nobody refers to.
    """
    cases = sample(scenario, every=every)
    assert [case for case in cases if case.outcome in LOSSES] == []
    assert {case.outcome for case in cases} >= {"ridden out", "recovered"}


@pytest.mark.parametrize(
    ("scenario", "every"),
    [
        ("rank1", 25),
        pytest.param("rank0", 59, marks=pytest.mark.exhaustive),
        pytest.param("rank0-resume", 59, marks=pytest.mark.exhaustive),
        pytest.param("rank1-resume", 19, marks=pytest.mark.exhaustive),
        pytest.param("rank0-writer", 29, marks=pytest.mark.exhaustive),
        pytest.param("rank1-writer", 19, marks=pytest.mark.exhaustive),
    ],
)
def test_nothing_is_lost_whatever_fails_on_one_rank(
    scenario: str, every: int, sample: Sample
) -> None:
    """The same where one rank of two is struck, or its writer: the other one waits for nobody who
    will not come, and every checkpoint has the parts of both.
    """
    cases = sample(scenario, every=every)
    assert [case for case in cases if case.outcome in LOSSES] == []
    assert {case.outcome for case in cases} >= {"ridden out", "recovered"}


def test_nothing_is_lost_on_an_object_store(
    sample: Sample, moto_server: S3Server, s3_credentials: dict[str, str]
) -> None:
    """The same where the store is S3."""
    cases = sample("save", every=200, server=moto_server)
    assert [case for case in cases if case.outcome in LOSSES] == []
    assert len(cases) >= 2
