from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from prefect import Flow
from prefect.client.schemas.objects import FlowRun, State
from support.damage import flip
from support.mlflow_server import MlflowServer
from support.prefect_runs import artifacts, client, events, table, task_runs
from support.prefect_server import PrefectServer, flow_run_logs, wait_until
from support.prefect_token_gate import token_gate

from ckpt_tasks import tasks
from ckpt_tasks.checkpointer.catalog import RunView, list_runs, view_run
from ckpt_tasks.config import AttemptConfig, RetentionConfig, ScheduleConfig
from ckpt_tasks.errors import CheckpointNotFoundError, ConfigError, StoreError
from ckpt_tasks.integrations.prefect import CheckpointStore, ModelRegistry, resumable_flow
from ckpt_tasks.store import open_store
from ckpt_tasks.tasks import RecoveryReport
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import CheckpointId

pytestmark = [pytest.mark.usefixtures("prefect_api"), pytest.mark.timeout(180)]

TESTS = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _trainer_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CKPT_TASKS_SAVE_ASYNCHRONOUS", "false")  # each save at its own step


def make_flow(
    store: Any, entrypoint: str = "support.toy_training:train", **options: Any
) -> Flow[..., dict[str, Any]]:
    return resumable_flow(
        entrypoint,
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


def test_retention_is_a_step(tmp_path: Path) -> None:
    """With rules: what the training itself has not marked yet is marked, and told in the log."""
    flow = make_flow(str(tmp_path), retention=RetentionConfig(latest=1))
    flow_run, state = execute(flow, epochs=1)

    assert state.is_completed()
    wait_until(lambda: len(task_runs(flow_run.id)) == 6, timeout=20, what="six task runs")
    names = [task_run.name.rpartition("-")[0] for task_run in task_runs(flow_run.id)]
    assert names[-3:] == ["verify", "apply retention", "publish report"]
    with closing(open_store(str(tmp_path))) as store:
        (run,) = [run.name for run in list_runs(store)]
        standings = [checkpoint.standing for checkpoint in view_run(store, run).checkpoints]
    assert standings[0] == "valid"
    assert set(standings[1:]) == {"expired"}


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
    flow_run, state = execute(make_flow(str(tmp_path), "support.toy_training:untrackable"))

    with pytest.raises(ConfigError, match="lock"):
        state.result()
    assert [t.run_count for t in task_runs(flow_run.id) if t.name.startswith("train")] == [1]
    assert len(view_run(open_store(str(tmp_path)), f"toy-{flow_run.id}").attempts) == 1


def test_killed_rank_is_retried_on_as_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank dies in step 5: the task's retry resumes at step 3, with two ranks again."""
    order = tmp_path / "kill"
    order.write_text("5", encoding="ascii")
    monkeypatch.setenv("TOY_KILL", str(order))
    flow = make_flow(str(tmp_path / "store"), "support.toy_ranks:ddp", nproc=2)

    flow_run, state = execute(flow, epochs=1)

    assert state.is_completed()
    assert [t.run_count for t in task_runs(flow_run.id) if t.name.startswith("train")] == [2]
    seen = view_run(open_store(str(tmp_path / "store")), f"toy-{flow_run.id}")
    starts = [a.resumed.checkpoint for a in seen.attempts if a.resumed]
    assert starts == [None, "step-00000003-a1-s1"]
    records = [c.record for c in seen.checkpoints if c.record]
    ranks = {(CheckpointId.parse(r.id).attempt, r.world_size) for r in records}
    assert ranks == {(1, 2), (2, 2)}
    assert records[0].position.step == 12


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


def test_block_gives_the_registry_and_its_credentials(
    mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    """A server that wants a token gets it, from the registrar and from the promote step."""
    with token_gate(mlflow_server.uri, "hush") as gate:
        ModelRegistry(
            tracking_uri=gate.url,
            experiment="gated",
            hyperparameter_tags=["width"],
            credentials={"MLFLOW_TRACKING_TOKEN": "hush"},
        ).save("toy-registry", overwrite=True)
        registry = ModelRegistry.load("toy-registry")
        flow_run, state = execute(make_flow(str(tmp_path), registry=registry), epochs=1)

    assert state.is_completed()
    assert (gate.passed > 0, gate.refused) == (True, 0)
    mlflow = MlflowClient(tracking_uri=mlflow_server.uri)
    versions = mlflow.search_model_versions("name = 'gated'")
    assert sorted(version.tags["ckpt.step"] for version in versions) == ["3", "6", "8"]
    assert {k for k in versions[0].tags if k.startswith("hparam.")} == {"hparam.width"}
    assert mlflow.get_model_version_by_alias("gated", "verified").tags["ckpt.step"] == "8"
    with client() as api:
        assert "hush" not in "\n".join(flow_run_logs(api, flow_run.id))


def test_environment_configures_a_flow_when_it_runs(
    tmp_path: Path, empty_mlflow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Store, schedule and registry come from variables and a file that its process has then.

    With a registry there is a promote step: the newest checkpoint, verified, gets the alias.
    """
    flow = resumable_flow("support.toy_training:train", name="toy", retries=0)
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    file = tmp_path / "ckpt.toml"
    file.write_text(f'[registry]\ntracking_uri = "{uri}"\nexperiment = "configured"\n')
    monkeypatch.setenv("CKPT_TASKS_CONFIG", str(file))
    monkeypatch.setenv("CKPT_TASKS_STORE_URL", str(tmp_path / "store"))
    monkeypatch.setenv("CKPT_TASKS_SCHEDULE_EVERY_STEPS", "5")

    flow_run, state = execute(flow, epochs=1)

    assert state.is_completed()
    seen = view_run(open_store(str(tmp_path / "store")), f"toy-{flow_run.id}")
    assert [c.record.position.step for c in seen.checkpoints if c.record] == [8, 5]
    (promote,) = [t for t in task_runs(flow_run.id) if t.name.startswith("promote")]
    assert promote.state_name == "Completed"
    version = MlflowClient(tracking_uri=uri).get_model_version_by_alias("configured", "verified")
    assert (version.tags["ckpt.run"], version.tags["ckpt.step"]) == (seen.run.run, "8")


def damaged_when_it_died(store: Path) -> RunView:
    """A run that died behind its checkpoints of steps 5 and 10, of which the newest is damaged."""
    execute(make_failing(store))
    seen = view_run(open_store(str(store)), "damaged")
    assert [c.record.position.step for c in seen.checkpoints if c.record] == [10, 5]
    newest = seen.checkpoints[0].record
    assert newest is not None
    data = store / "damaged" / "data" / newest.write_id
    for file in data.glob("*.safetensors"):
        flip(0.5)(file)
    return seen


def make_failing(store: Path) -> Flow[..., dict[str, Any]]:
    return resumable_flow(
        "support.toy_failing:poisoned",
        name="toy",
        store=str(store),
        schedule=ScheduleConfig(every_steps=5),
        run_name="damaged",
        retries=0,
    )


def test_damaged_checkpoint_is_told_and_shown(prefect_api: PrefectServer, tmp_path: Path) -> None:
    """The next flow run passes it over: an event, a row in the table, an older start."""
    before = damaged_when_it_died(tmp_path)
    newest, older = (c.id for c in before.checkpoints)

    flow_run, state = execute(make_failing(tmp_path))

    assert state.is_completed()
    rows = {row["checkpoint"]: row for row in table(artifacts(flow_run.id)["checkpoints"][0])}
    assert rows[newest]["state"].startswith("quarantined: ")
    assert (rows[newest]["step"], rows[newest]["epoch"]) == (10, 1)
    assert rows[older]["state"] == "committed"

    def told(what: str) -> list[dict[str, Any]]:
        run = f"ckpt_tasks.run.{before.run.uid}"
        return [e["payload"] for e in events(prefect_api, f"ckpt_tasks.{what}", related=run)]

    wait_until(lambda: len(told("attempt.resumed")) == 2, timeout=20, what="starts are told")
    starts = {payload["attempt"]: payload["checkpoint"] for payload in told("attempt.resumed")}
    assert starts == {1: None, 2: older}
    wait_until(lambda: told("checkpoint.quarantined"), timeout=20, what="damage is told")
    assert [payload["checkpoint"] for payload in told("checkpoint.quarantined")] == [newest]
