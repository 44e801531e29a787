from __future__ import annotations

import subprocess
import sys
from uuid import uuid4

import pytest
from support import told_events
from support.prefect_runs import events
from support.prefect_server import PrefectServer, wait_until
from support.told_events import CHECKPOINT, TOLD


@pytest.fixture(scope="module")
def uid(prefect_server: PrefectServer) -> str:
    """Of a training run whose events have been told."""
    uid = uuid4().hex
    subprocess.run(
        [sys.executable, told_events.__file__, uid],
        env=prefect_server.process_environment(),
        check=True,
    )
    return uid


@pytest.mark.parametrize("name", TOLD)
def test_event_arrives_with_its_resource_and_what_it_is_about(
    prefect_server: PrefectServer, uid: str, name: str
) -> None:
    """An automation can match each by name, resource and runs, and read all of the event."""
    run = f"ckpt_tasks.run.{uid}"
    (event,) = wait_until(
        lambda: events(prefect_server, f"ckpt_tasks.{name}", related=run), timeout=60, what=name
    )

    about = "attempt" if name.startswith("attempt") else "checkpoint"
    which = "2" if about == "attempt" else CHECKPOINT
    assert event["resource"]["prefect.resource.id"] == f"ckpt_tasks.{about}.{uid}.{which}"
    roles = {r["prefect.resource.role"]: r["prefect.resource.id"] for r in event["related"]}
    assert roles == {"training-run": run, "mlflow-run": "mlflow.run.r1"}
    told = TOLD[name]
    assert event["payload"]["run"] == "toy"
    for field in ("why", "lost_steps", "unprotected", "version", "size"):
        assert event["payload"].get(field) == getattr(told, field, None)
