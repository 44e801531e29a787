"""Whatever is killed under a real scheduler, the run resumes and ends as if nothing had been."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.airflow_runs import Airflow, assert_one_whole_run, kill

pytestmark = pytest.mark.timeout(240)


def test_killed_trainer_is_retried_by_its_task(
    airflow: Airflow, whole_digest: str, tmp_path: Path
) -> None:
    """The trainer dies by SIGKILL; the task's retry resumes; the DAG run succeeds."""
    run = airflow.trigger(tmp_path)
    kill(run.wait_for_step(12))

    assert run.wait_for_state("success", "failed") == "success", run.told()

    assert run.task()["try_number"] == 2
    assert_one_whole_run(run, whole_digest, attempts=2)
