"""`CheckpointSensor`, waiting in the worker and in the triggerer."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

from support.dag_home import DagHome

# isort: split
import psutil
import pytest
from airflow.sdk.exceptions import AirflowFailException, TaskDeferred
from airflow.serialization.serialized_objects import BaseSerialization
from support.damage import take_away
from support.made_runs import MadeAttempt, MadeRun
from support.mlflow_server import MlflowServer

from ckpt_tasks import tasks
from ckpt_tasks.config import CheckpointConfig, RegistryConfig, StoreConfig
from ckpt_tasks.errors import ConfigError
from ckpt_tasks.integrations.airflow import CheckpointSensor
from ckpt_tasks.integrations.airflow.configuration import Settings
from ckpt_tasks.integrations.airflow.triggers import CheckpointTrigger
from ckpt_tasks.registry import RunDescription, load_registry
from ckpt_tasks.store import open_store

RUN = "digits/1"
SECRET = "hush-hush-secret"  # noqa: S105 - what must not be seen anywhere

DAG_FILE = """
from airflow.sdk import DAG
from ckpt_tasks.integrations.airflow import CheckpointSensor

with DAG("waits"):
    for name, deferrable in {"worker": False, "triggerer": True}.items():
        CheckpointSensor(
            task_id=name, run_name="digits/1", store=STORE, deferrable=deferrable,
            newer_than="{{ params.after }}", better_than="loss:min:0.6", poke_interval=0.2,
            params={"after": 4},
        )
"""


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "store")


@pytest.fixture
def run(store: str) -> MadeRun:
    return MadeRun(open_store(store), RUN)


@pytest.fixture
def attempt(run: MadeRun) -> MadeAttempt:
    """It has no checkpoint yet."""
    return run.begin()


def _trigger(
    default_store: str, *, poll_interval: float = 0.1, **settings: Any
) -> CheckpointTrigger:
    base = CheckpointConfig(store=StoreConfig(url=default_store))
    wanted = tasks.parse_wanted(RUN)
    return CheckpointTrigger.of(wanted, Settings(**settings), base, poll_interval=0.1)


async def _first_event(trigger: CheckpointTrigger) -> dict[str, Any]:
    async for event in trigger.run():
        payload: dict[str, Any] = event.payload
        return payload
    raise AssertionError("no event")


def _again(trigger: CheckpointTrigger) -> CheckpointTrigger:
    """The trigger as the triggerer makes it, from what the database keeps."""
    path, arguments = trigger.serialize()
    assert path == f"{CheckpointTrigger.__module__}.CheckpointTrigger"
    stored = json.loads(json.dumps(BaseSerialization.serialize(arguments)))
    return CheckpointTrigger(**BaseSerialization.deserialize(stored))


async def _child() -> psutil.Process:
    """The process that looks, as soon as there is one."""
    me = psutil.Process()
    while True:
        for child in me.children():
            try:
                if "ckpt_tasks.tasks.find" in child.cmdline():
                    return child
            except psutil.NoSuchProcess:
                continue
        await asyncio.sleep(0.01)


def test_poke_finds_what_is_there(store: str, attempt: MadeAttempt) -> None:
    """It returns the checkpoint as an asset's event tells it, or goes on waiting."""
    sensor = CheckpointSensor(task_id="wait", run_name=RUN, store=store, newer_than=4)
    assert not sensor.poke({})
    newest = attempt.commit(8)

    found = sensor.poke({})

    assert found
    assert found.xcom_value["checkpoint"] == newest
    assert (found.xcom_value["step"], found.xcom_value["metrics"]) == (8, {"loss": 0.5})


def test_poke_asks_a_store_again_that_does_not_answer(
    store: str, run: MadeRun, attempt: MadeAttempt
) -> None:
    """A sensor that waits for hours does not fail at the first interruption."""
    newest = attempt.commit(8)
    sensor = CheckpointSensor(task_id="wait", run_name=RUN, store=store)
    give_back = take_away(Path(store))
    assert not sensor.poke({})

    give_back()

    assert sensor.poke({}).xcom_value["checkpoint"] == newest


@pytest.mark.parametrize("deferrable", [True, False])
@pytest.mark.parametrize(
    "wrong", [{"better_than": "loss:0.5"}, {"store": "nosuchscheme://x"}, {"ckpt_conn_id": "none"}]
)
def test_wrong_configuration_fails_at_once(
    store: str, deferrable: bool, wrong: dict[str, Any]
) -> None:
    """With one line that names it, and no retry is spent."""
    arguments = {"run_name": RUN, "store": store, **wrong}
    sensor = CheckpointSensor(task_id="wait", deferrable=deferrable, **arguments)

    with pytest.raises(AirflowFailException, match=r"loss:0\.5|nosuchscheme|'none'"):
        sensor.execute({})


def test_default_is_what_airflow_is_configured_to() -> None:
    """Airflow's own default is to wait in the worker."""
    assert CheckpointSensor(task_id="wait", run_name=RUN).deferrable is False


def test_deferrable_sensor_looks_once_before_it_defers(store: str, attempt: MadeAttempt) -> None:
    """What is there already costs no triggerer; else the trigger gets interval and time-out."""
    sensor = CheckpointSensor(
        task_id="wait", run_name=RUN, store=store, deferrable=True, poke_interval=7, timeout=60
    )
    with pytest.raises(TaskDeferred) as deferred:
        sensor.execute({})
    assert deferred.value.trigger.poll_interval == 7
    assert deferred.value.timeout.total_seconds() == 60

    newest = attempt.commit(8)
    assert sensor.execute({})["checkpoint"] == newest


def test_end_of_waiting_is_the_trigger_s_answer() -> None:
    """A checkpoint is returned, an error fails for good."""
    sensor = CheckpointSensor(task_id="wait", run_name=RUN)

    assert sensor.execute_complete({}, {"found": {"checkpoint": "c"}}) == {"checkpoint": "c"}
    with pytest.raises(AirflowFailException, match="no such store"):
        sensor.execute_complete({}, {"error": "no such store"})


def test_trigger_fires_when_the_checkpoint_comes(store: str, attempt: MadeAttempt) -> None:
    """It looks again and again, and says the same as the sensor would."""

    async def wait() -> dict[str, Any]:
        waiting = asyncio.create_task(_first_event(_again(_trigger(store))))
        await _child()
        attempt.commit(8)
        return await waiting

    found = asyncio.run(wait())["found"]

    assert found == CheckpointSensor(task_id="w", run_name=RUN, store=store).poke({}).xcom_value


def test_trigger_does_not_block_the_loop_it_shares(
    store: str, run: MadeRun, attempt: MadeAttempt
) -> None:
    """While a look goes on, other triggers' coroutines run."""

    async def wait() -> int:
        turns = 0
        waiting = asyncio.create_task(_first_event(_trigger(store)))
        await _child()
        attempt.commit(8)
        while not waiting.done():
            turns += 1
            await asyncio.sleep(0)
        await waiting
        return turns

    assert asyncio.run(wait()) > 100


def test_killed_look_is_repeated(
    store: str, attempt: MadeAttempt, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL of the process that looks, by the OOM killer say, costs one look."""
    attempt.commit(8)

    async def wait() -> dict[str, Any]:
        waiting = asyncio.create_task(_first_event(_trigger(store)))
        child = await _child()
        child.send_signal(signal.SIGSTOP)
        child.kill()
        return await waiting

    assert "found" in asyncio.run(wait())
    assert "killed by signal 9" in capsys.readouterr().out


def test_look_ends_with_the_trigger(store: str, attempt: MadeAttempt) -> None:
    """A cancelled trigger, of a task that was cleared say, leaves no process behind."""

    async def wait() -> psutil.Process:
        waiting = asyncio.create_task(_first_event(_trigger(store)))
        child = await _child()
        child.send_signal(signal.SIGSTOP)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return child

    assert not asyncio.run(wait()).is_running()


def test_store_that_does_not_answer_is_asked_again(
    store: str, run: MadeRun, attempt: MadeAttempt
) -> None:
    """The trigger goes on waiting through an interruption."""
    attempt.commit(8)
    give_back = take_away(Path(store))

    async def wait() -> dict[str, Any]:
        waiting = asyncio.create_task(_first_event(_trigger(store)))
        first = await _child()
        while first.is_running():
            await asyncio.sleep(0.01)
        await _child()  # the second look: the first one's error has not ended the waiting
        give_back()
        return await waiting

    assert "found" in asyncio.run(wait())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"store": "nosuchscheme://x"}, "nosuchscheme"), ({"ckpt_conn_id": "gone"}, "'gone'")],
)
def test_configuration_that_cannot_work_ends_the_waiting(
    store: str, settings: dict[str, Any], message: str
) -> None:
    """A connection that is deleted meanwhile, say: the event has the reason."""
    event = asyncio.run(_first_event(_trigger(store, **settings)))

    assert message in event["error"]


def test_broken_installation_ends_the_waiting(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that cannot even look says why, instead of being started for ever."""
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('no such library')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    event = asyncio.run(_first_event(_trigger(store)))

    assert "no such library" in event["error"]


def test_credentials_reach_the_look_and_nothing_else(
    tmp_path: Path, store: str, attempt: MadeAttempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in its environment only: not in the trigger, nor in the triggerer's process."""
    attempt.commit(8)
    fields = {"conn_type": "aws", "login": "k", "password": SECRET}
    monkeypatch.setenv("AIRFLOW_CONN_KEYS", json.dumps(fields))
    extra = {"storage_conn_id": "keys"}
    place = {"conn_type": "ckpt_tasks", "host": store, "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_PLACE", json.dumps(place))
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    trigger = _trigger("unused", ckpt_conn_id="place")
    assert SECRET not in repr(trigger.serialize())

    async def wait() -> tuple[list[str], str | None, dict[str, Any]]:
        waiting = asyncio.create_task(_first_event(trigger))
        child = await _child()
        seen = child.environ().get("AWS_SECRET_ACCESS_KEY")
        return child.cmdline(), seen, await waiting

    command, seen, event = asyncio.run(wait())

    assert seen == SECRET
    assert SECRET not in repr(command) + repr(event)
    assert "AWS_SECRET_ACCESS_KEY" not in os.environ


@pytest.mark.parametrize(
    "settings",
    [
        {"store": f"s3://key:{SECRET}@bucket/p"},
        {"registry": RegistryConfig(tracking_uri=f"https://me:{SECRET}@mlflow.example")},
    ],
)
def test_addresses_with_credentials_are_not_deferred(store: str, settings: dict[str, Any]) -> None:
    """They would be written to Airflow's database; the error says what to use."""
    with pytest.raises(ConfigError, match="ckpt_conn_id") as caught:
        _trigger(store, **settings)

    assert SECRET not in str(caught.value)


def test_registered_checkpoint_on_a_server(
    store: str,
    run: MadeRun,
    attempt: MadeAttempt,
    mlflow_server: MlflowServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Committed is not enough with a registry; then the answer names run and version."""
    place = {"conn_type": "mlflow", "host": "127.0.0.1", "port": mlflow_server.port}
    monkeypatch.setenv("AIRFLOW_CONN_TRACKING", json.dumps(place))
    config = RegistryConfig(experiment="waited-for")
    trigger = _trigger(store, mlflow_conn_id="tracking", registry=config)
    committed = attempt.commit(8)
    sensor = CheckpointSensor(
        task_id="wait", run_name=RUN, store=store, mlflow_conn_id="tracking", registry=config
    )
    assert not sensor.poke({})

    registry = load_registry(
        RegistryConfig(tracking_uri=mlflow_server.uri, experiment="waited-for")
    )
    description = RunDescription(
        run=RUN, uid=run.identity.uid, store_url=run.store.url, hyperparameters={"lr": 0.1}
    )
    registry.open_run(registry.create_run(description), description)
    registration = run.register(registry, committed)

    found = asyncio.run(_first_event(_again(trigger)))["found"]
    assert found == sensor.poke({}).xcom_value
    assert (found["mlflow_run_id"], found["version"]) == (
        registration.run_id,
        registration.version,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> DagHome:
    return DagHome(tmp_path_factory.mktemp("sensor")).migrate()


def test_sensor_in_a_dag(home: DagHome, store: str, attempt: MadeAttempt) -> None:
    """Under Airflow, templates rendered: both ways of waiting return the checkpoint as XCom."""
    (home.dags / "waits.py").write_text(DAG_FILE.replace("STORE", repr(store)))
    first = attempt.commit(8)

    done = home.run("waits")

    assert (done.state, done.state_of("worker")) == ("success", "success"), done.log
    assert done.xcom("worker")["checkpoint"] == first
    assert done.xcom("triggerer") == done.xcom("worker")
