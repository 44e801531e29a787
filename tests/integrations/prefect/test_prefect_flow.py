from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prefect import Flow
from prefect.client.schemas.objects import FlowRun, State
from support.prefect_runs import artifacts, client, table, task_runs
from support.prefect_server import flow_run_logs, wait_until

from ckpt_tasks import tasks
from ckpt_tasks.checkpointer.catalog import view_run
from ckpt_tasks.config import AttemptConfig, ScheduleConfig
from ckpt_tasks.errors import CheckpointNotFoundError, ConfigError, StoreError
from ckpt_tasks.integrations.prefect import CheckpointStore, resumable_flow
from ckpt_tasks.store import open_store
from ckpt_tasks.tasks import RecoveryReport
from ckpt_tasks.training.spec import TrainSpec

pytestmark = [pytest.mark.usefixtures("prefect_api"), pytest.mark.timeout(180)]

TESTS = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _trainer_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def make_flow(store: Any, function: str = "train", **options: Any) -> Flow[..., dict[str, Any]]:
    return resumable_flow(
        f"support.toy_training:{function}",
        name="toy",
        store=store,
        schedule=ScheduleConfig(every_steps=3),
        attempt=AttemptConfig(heartbeat=1.0),
        retries=2,
        retry_delay_seconds=[0.1],
        **options,
    )


def execute(flow: Flow[..., Any], **parameters: Any) -> tuple[FlowRun, State[Any]]:
    state: State[Any] = flow(**parameters, return_state=True)
    with client() as api:
        return api.read_flow_run(state.state_details.flow_run_id), state


def test_steps_are_tasks_in_order(tmp_path: Path) -> None:
    """Each step is a task run with its own name, and the result is the outcome as plain data."""
    flow_run, state = execute(make_flow(str(tmp_path)), epochs=1)

    result = state.result()
    assert (result["code"], result["position"]["step"]) == (0, 8)
    wait_until(lambda: len(task_runs(flow_run.id)) == 5, timeout=20, what="five task runs")
    names = [task_run.name.rpartition("-")[0] for task_run in task_runs(flow_run.id)]
    assert names == ["resolve run", "recover", "train", "verify", "publish report"]


def test_log_shows_the_training_as_it_goes(tmp_path: Path) -> None:
    """The flow run's log on the server tells where an attempt starts and what it commits."""
    flow_run, _ = execute(make_flow(str(tmp_path)), epochs=1)

    def told() -> bool:
        with client() as api:
            log = "\n".join(flow_run_logs(api, flow_run.id))
        return "saved step-00000006-a1-s2" in log and "starts from the beginning" in log

    assert wait_until(told, timeout=30, what="the log tells of commits")


def test_storage_away_for_a_moment_fails_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that only looks is tried again where storage does not answer: the flow completes."""
    looks: list[TrainSpec] = []
    recover = tasks.recover

    def away_at_first(spec: TrainSpec) -> RecoveryReport:
        looks.append(spec)
        if len(looks) == 1:
            raise StoreError("storage did not answer")
        return recover(spec)

    monkeypatch.setattr(tasks, "recover", away_at_first)
    _, state = execute(make_flow(str(tmp_path)), epochs=1)

    assert state.is_completed()
    assert len(looks) == 2


def test_unrestorable_start_is_not_retried(tmp_path: Path) -> None:
    """Outcome 4: asking for a checkpoint that is not there fails at the first try."""
    flow_run, state = execute(make_flow(str(tmp_path)), resume="step-00000900-a1-s1")

    with pytest.raises(CheckpointNotFoundError, match="step-00000900-a1-s1"):
        state.result()
    assert [t.run_count for t in task_runs(flow_run.id) if t.name.startswith("train")] == [1]


def test_mistake_in_the_training_code_is_not_retried(tmp_path: Path) -> None:
    """Outcome 2: tracking what cannot be saved fails at the first try, naming the type."""
    flow_run, state = execute(make_flow(str(tmp_path), "untrackable"))

    with pytest.raises(ConfigError, match="lock"):
        state.result()
    assert [t.run_count for t in task_runs(flow_run.id) if t.name.startswith("train")] == [1]
    assert len(view_run(open_store(str(tmp_path)), f"toy-{flow_run.id}").attempts) == 1


def test_same_run_name_goes_on_with_the_same_training(tmp_path: Path) -> None:
    """A fixed run name: a later flow run finds the training complete and trains nothing."""
    flow = make_flow(str(tmp_path), run_name="nightly-{epochs}")
    execute(flow, epochs=1)
    flow_run, state = execute(flow, epochs=1)

    assert state.is_completed()
    seen = view_run(open_store(str(tmp_path)), "nightly-1")
    assert [a.number for a in seen.attempts if a.resumed is not None] == [1]
    rows = table(artifacts(flow_run.id)["checkpoints"][0])
    assert [row["step"] for row in rows] == [8, 6, 3]


def test_block_gives_the_store_and_its_credentials(tmp_path: Path) -> None:
    """A saved block is loaded by name; its credentials reach the trainer and nothing else."""
    secret = str(tmp_path / "hush" / "digest")
    Path(secret).parent.mkdir()
    CheckpointStore(url=str(tmp_path / "store"), credentials={"TOY_DIGEST": secret}).save(
        "toy-store", overwrite=True
    )
    flow_run, state = execute(make_flow(CheckpointStore.load("toy-store")), epochs=1)

    assert state.is_completed()
    assert Path(secret).exists()
    with client() as api:
        shown = "\n".join(flow_run_logs(api, flow_run.id))
    shown += str(flow_run.parameters) + str(artifacts(flow_run.id))
    assert "hush" not in shown
    records = [p for p in (tmp_path / "store").rglob("*") if p.is_file()]
    assert not [p for p in records if b"hush" in p.read_bytes()]
