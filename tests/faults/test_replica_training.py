"""A run that is moved: trained here, copied, adopted and trained to its end there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from mlflow import MlflowClient
from support.attempt_forks import AttemptForks, Kill
from support.replicas import check_whole
from support.run_checks import temporary_files
from support.toy_runs import toy_spec

from ckpt_tasks.checkpointer.catalog import view_run
from ckpt_tasks.config import AttemptConfig, RegistryConfig
from ckpt_tasks.errors import CheckpointNotFoundError
from ckpt_tasks.store import open_store
from ckpt_tasks.tasks import adopt, copy, reconcile
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import EXIT_DONE, EXIT_USAGE

QUICK = AttemptConfig(heartbeat=0.1, takeover_after=0.5)
TESTS = Path(__file__).parents[1]


@pytest.fixture
def moved(root: Path) -> TrainSpec:
    """The same training in the store that it is moved to, by another invocation."""
    return toy_spec(root.with_name("moved"), invocation="elsewhere")


def killed(*arguments: object) -> bool:
    """Copy or adopt in a process of its own; whether it was killed as it was told."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "support.copy_child", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode in (0, -signal.SIGKILL)
    return done.returncode != 0


def test_the_moved_run_ends_bit_identical(
    spec: TrainSpec,
    moved: TrainSpec,
    forks: AttemptForks,
    finish: Callable[[TrainSpec], None],
    mlflow_database: str,
) -> None:
    """Killed in the midst of training, of the copy and of the adoption; a replica is not trained.
    The original, left behind, ends bit-identical as well, and each is a run of its own in MLflow.
    """
    here, there = spec.config.store, moved.config.store
    assert forks.run(spec, kill=Kill(step=13)).killed
    for number, when in ((1, "before"), (4, "during"), (4, "after"), (3, "during")):
        assert killed(here.url, there.url, spec.run, number, when)
        with open_store(there) as store:
            try:
                check_whole(store, spec.run)
            except CheckpointNotFoundError:
                assert number == 1
    assert temporary_files(Path(there.url))  # of files that were not whole
    assert copy(here, there, spec.run).copied
    assert copy(here, there, spec.run).size == 0

    refused = forks.run(moved).outcome
    assert (refused.code, "read-only replica" in refused.message) == (EXIT_USAGE, True)
    assert killed("-", there.url, spec.run, 2)
    assert forks.run(moved).outcome.code == EXIT_USAGE
    identity = adopt(there, spec.run)
    finish(moved)
    finish(spec)
    with open_store(there) as store:
        view = view_run(store, spec.run)
        check_whole(store, spec.run)
    assert view.completed is not None
    assert view.completed.uid == identity.uid
    first, adoption, last = (attempt.resumed for attempt in view.attempts)
    assert first is not None
    assert adoption is None
    assert last is not None
    assert last.checkpoint is not None

    client = MlflowClient(mlflow_database)
    registry = RegistryConfig(tracking_uri=mlflow_database)
    for each in (moved, spec, moved):
        config = msgspec.structs.replace(each.config, registry=registry, attempt=QUICK)
        assert reconcile(config, each.run).problem is None
    [experiment] = [e for e in client.search_experiments() if e.name != "Default"]
    runs = client.search_runs([experiment.experiment_id])
    assert {run.data.tags["ckpt.uid"] for run in runs} == {identity.uid, identity.ancestors[0].uid}
    versions = Counter(v.run_id for v in client.search_model_versions())
    assert len(versions) == len(runs) == 2
    assert versions[runs[0].info.run_id] == len(view.checkpoints)


def test_a_complete_run_stays_complete(
    spec: TrainSpec, moved: TrainSpec, forks: AttemptForks
) -> None:
    """As a replica it is not trained further, adopted there is nothing left to train; it is told
    under its own uid.
    """
    assert forks.run(spec).outcome.code == EXIT_DONE
    here, there = spec.config.store, moved.config.store
    copy(here, there, spec.run)
    assert forks.run(moved).outcome.code == EXIT_USAGE
    identity = adopt(there, spec.run)
    outcome = forks.run(moved).outcome
    assert (outcome.code, outcome.uid) == (EXIT_DONE, identity.uid)
    assert "complete already" in outcome.message
