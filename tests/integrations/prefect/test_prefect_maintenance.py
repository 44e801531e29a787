"""The shipped maintenance flow, executed on a real server, with a real MLflow."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient
from prefect.flows import load_flow_from_entrypoint
from support.made_runs import MadeRun
from support.prefect_runs import artifacts, client, task_runs
from support.prefect_server import PrefectServer, wait_until

from ckpt_tasks.checkpointer.catalog import list_checkpoints
from ckpt_tasks.errors import MaintenanceError
from ckpt_tasks.store import open_store

pytestmark = pytest.mark.timeout(180)

FLOW = Path(__file__).parents[3] / "flows" / "maintain.py"


def test_store_is_maintained_in_four_tasks(
    prefect_api: PrefectServer, empty_mlflow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run changes nothing; then what MLflow lacks is there, what no rule keeps is gone, a
    table tells of each, and the flow fails for the run that is damaged.
    """
    tracking_uri = f"sqlite:///{shutil.copy(empty_mlflow, tmp_path / 'mlflow.db')}"
    monkeypatch.setenv("CKPT_TASKS_STORE_URL", str(tmp_path / "store"))
    monkeypatch.setenv("CKPT_TASKS_REGISTRY_TRACKING_URI", tracking_uri)
    monkeypatch.setenv("CKPT_TASKS_RETENTION_LATEST", "1")
    monkeypatch.setenv("CKPT_TASKS_RETENTION_GRACE", "0.001s")
    monkeypatch.setenv("CKPT_TASKS_ATTEMPT_HEARTBEAT", "0.1s")
    monkeypatch.setenv("CKPT_TASKS_ATTEMPT_TAKEOVER_AFTER", "0.5s")
    store = open_store(str(tmp_path / "store"), for_writing=True)
    run, broken = MadeRun(store, "night"), MadeRun(store, "broken")
    attempt = run.begin()
    saved = [attempt.save(step) for step in (1, 2, 3)]
    run.fail(attempt.number, step=3)
    flow = load_flow_from_entrypoint(f"{FLOW}:maintain")

    assert list(flow.parameters.properties) == ["dry_run"]
    told = flow(dry_run=True)
    assert (told["registered"], told["expired"], told["kept"]) == (3, 2, 3)
    assert list_checkpoints(store, run.layout) == saved

    broken.damage(broken.layout.run_record, position=3)
    state = flow(return_state=True)
    with pytest.raises(MaintenanceError, match=r"of 2 runs .*'broken'"):
        state.result()
    assert list_checkpoints(store, run.layout) == [saved[-1]]
    (version,) = MlflowClient(tracking_uri=tracking_uri).search_model_versions()
    assert version.tags["ckpt.step"] == "3"

    with client() as api:
        flow_run = api.read_flow_run(state.state_details.flow_run_id)
    wait_until(lambda: len(task_runs(flow_run.id)) == 4, timeout=20, what="four task runs")
    names = [task_run.name.rpartition("-")[0] for task_run in task_runs(flow_run.id)]
    assert names == ["reconcile", "expire", "collect", "report"]
    (table,) = artifacts(flow_run.id)["maintenance"]
    assert table.key == "maintenance-maintain"
    for shown in ('"run": "night"', '"registered": 3', '"collected": 2', "cannot be identified"):
        assert shown in str(table.data)
