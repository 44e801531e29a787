"""The shipped DAGs, from a bundle of their own, under a real scheduler."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.airflow_runs import Airflow, DagRun

pytestmark = pytest.mark.timeout(600)  # the first one starts Airflow and MLflow


def test_new_digits_model_is_evaluated(airflow: Airflow, tmp_path: Path) -> None:
    """The evaluation starts by itself, with the checkpoint that the training has promoted."""
    run_id = airflow.api.trigger("train-digits", {"epochs": 1, "width": 8})
    run = DagRun(airflow, tmp_path, "train-digits", run_id, f"train-digits-{run_id}")
    assert run.wait_for_state("success", "failed") == "success", run.told()
    newest = run.view().newest
    assert newest is not None
    assert newest.record is not None

    evaluated = run.followed_by("evaluate-digits")

    assert evaluated.state == "success", evaluated.log("evaluate")
    told = evaluated.xcom("choose_checkpoint")
    assert told["uri"].endswith(f"/commits/{newest.id}.json")
    assert told["digest"] == run.asset_event("train-digits")["digest"]
    measured = newest.record.metrics["val_accuracy"]
    assert evaluated.xcom("evaluate") == pytest.approx(float(measured))
