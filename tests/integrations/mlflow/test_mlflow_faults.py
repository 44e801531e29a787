"""A registration that dies, loses answers or finds the server gone is completed, never doubled."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import support.mlflow_kill
import support.mlflow_replay_kill
from mlflow import MlflowClient
from support.mlflow_kill import MANY
from support.mlflow_proxy import Faults, mlflow_proxy
from support.mlflow_server import MlflowServer

from ckpt_tasks.config import RegistryConfig
from ckpt_tasks.errors import RegistryError
from ckpt_tasks.format.codec import encode
from ckpt_tasks.integrations.mlflow import MlflowRegistry
from ckpt_tasks.registry import Registration, RunDescription
from ckpt_tasks.testing.registry import example_description, example_record, rows_of

EXPERIMENT = "faults"


def assert_everything_once(uri: str, uid: str, *, rows: int = 3) -> None:
    """One run, one logged model that is its output, one version, each row once; all complete."""
    client = MlflowClient(uri, registry_uri=uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    of_uid = f"tags.`ckpt.uid` = '{uid}'"
    (run,) = client.search_runs([experiment.experiment_id], filter_string=of_uid)
    run_id = run.info.run_id
    (model,) = client.search_logged_models([experiment.experiment_id], filter_string=of_uid)
    assert model.status == "READY"
    (version,) = client.search_model_versions(f"run_id = '{run_id}'")
    assert len([name for name in model.params if name.startswith("layers.")]) == MANY
    assert len([name for name in run.data.params if name.startswith("layers.")]) == MANY
    assert version.source == f"models:/{model.model_id}"
    outputs = client.get_run(run_id).outputs
    assert [output.model_id for output in outputs.model_outputs] == [model.model_id]
    assert len(client.get_metric_history(run_id, "loss")) == rows
    shown = {metric.key for metric in client.get_logged_model(model.model_id).metrics}
    assert shown == {"loss", "ckpt/epoch", "ckpt/bytes"}
    (manifest,) = client.list_artifacts(run_id, "checkpoints/step-00000003-a1-s1")
    assert manifest.path.endswith("manifest.json")


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("database", 2),
        ("server", 4),
        pytest.param("database", 1, marks=pytest.mark.exhaustive),
        pytest.param("server", 1, marks=pytest.mark.exhaustive),
    ],
)
def test_killed_before_any_request(
    kind: str, step: int, sqlite_uri: str, request: pytest.FixtureRequest
) -> None:
    """Killed by SIGKILL before the n-th request to MLflow, for every n or every `step`-th, a
    second process completes the run and the registration: one of each.
    """
    uri = sqlite_uri if kind == "database" else request.getfixturevalue("mlflow_server").uri
    done = subprocess.run(
        [sys.executable, support.mlflow_kill.__file__, uri, EXPERIMENT, str(step)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    uids = done.stdout.split()
    assert len(uids) >= 15 // step
    for uid in uids:
        assert_everything_once(uri, uid)


def test_killed_while_it_publishes_a_replay(mlflow_server: MlflowServer) -> None:
    """Killed by SIGKILL before every eighth request, by the next registrar each step is published
    once, with its first value, and what was done again is counted once: in event, tag and note.
    """
    program = support.mlflow_replay_kill
    done = subprocess.run(
        [sys.executable, "-m", program.__name__, mlflow_server.uri, EXPERIMENT, "8"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    uids, told = done.stdout.split("\n")[:-1:2], done.stdout.split("\n")[1::2]
    assert len(uids) >= 3
    expected = "replayed 3 steps, 3 came out differently, first step 4 (loss: 0.5, then 0.75); "
    assert all(line.startswith(expected) for line in told)
    client = MlflowClient(mlflow_server.uri, registry_uri=mlflow_server.uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    for uid in uids:
        (run,) = client.search_runs(
            [experiment.experiment_id], filter_string=f"tags.`ckpt.uid` = '{uid}'"
        )
        losses = client.get_metric_history(run.info.run_id, "loss")
        first = [program.FIRST] * program.DIED_AT
        later = [program.REPLAYED] * (program.DONE - program.DIED_AT)
        assert sorted((m.step, m.value) for m in losses) == [*enumerate([*first, *later], 1)]
        assert len(client.get_metric_history(run.info.run_id, "seen")) == program.DONE
        assert run.data.tags["ckpt.replay"].startswith("diverged: 3 of 3 steps, attempt 2; ")
        assert f"- Attempt 2 {expected}" in run.data.tags["mlflow.note.content"]


def described() -> RunDescription:
    """A run with more hyperparameters than one request takes."""
    return example_description(hyperparameters={f"layers.{n}.width": n for n in range(MANY)})


def attempt(uri: str, description: RunDescription) -> Registration:
    """All that a registrar does until the first checkpoint is registered."""
    registry = MlflowRegistry(RegistryConfig(tracking_uri=uri, experiment=EXPERIMENT))
    ids = registry.find_run(description) or registry.create_run(description)
    registry.open_run(ids, description)
    registry.log_metrics(rows_of("loss", [3.0, 2.0, 1.0]))
    record = example_record(description, 3, metrics={"loss": 1.0})
    return registry.register(record, uri="s3://bucket/x.json", manifest=encode(record))


def repeated(uri: str, description: RunDescription) -> Registration:
    """`attempt`, once more after its first error, as the registrar repeats what failed."""
    with pytest.raises(RegistryError):
        attempt(uri, description)
    return attempt(uri, description)


def requests_of_an_attempt(uri: str, faults: Faults) -> list[str]:
    """Paths of the requests of an attempt without faults."""
    faults.reset()
    attempt(uri, described())
    return faults.seen


def test_lost_answers(mlflow_server: MlflowServer) -> None:
    """The answer to the n-th request is lost, for every n: the repeated work makes no second
    run, logged model or version of what the server had done.

    One of them, the link to the run, is not repeated: reading the run tells that it was done.
    """
    with mlflow_proxy(mlflow_server.uri) as (uri, faults):
        attempt(uri, described())  # the only one that makes the experiment and the model's name
        for number, path in enumerate(requests_of_an_attempt(uri, faults), start=1):
            description = described()
            faults.reset(lose_answer_to=number)
            (attempt if path.endswith("runs/outputs") else repeated)(uri, description)
            assert_everything_once(mlflow_server.uri, description.uid)


@pytest.mark.parametrize("late", ["logged-models", "model-versions/create"])
def test_requests_carried_out_late(mlflow_server: MlflowServer, late: str) -> None:
    """A request given up and carried out after its repetition leaves a twin, which the next
    registration removes; the registration itself stays the same.
    """
    with mlflow_proxy(mlflow_server.uri) as (uri, faults):
        paths = requests_of_an_attempt(uri, faults)
        description = described()
        faults.reset(hold_back=1 + next(i for i, path in enumerate(paths) if path.endswith(late)))
        first = repeated(uri, description)
        assert faults.release() == 1
        assert attempt(uri, description) == first
        assert_everything_once(mlflow_server.uri, description.uid)


def test_server_stopped_and_started(tmp_path: Path) -> None:
    """While the server is down every call ends with `RegistryError` at once, where MLflow's own
    retries would outlast this test's time-out; when it is back, the same registry goes on.
    """
    server = MlflowServer(tmp_path / "server")
    with server:
        description = described()
        registry = MlflowRegistry(RegistryConfig(tracking_uri=server.uri, experiment=EXPERIMENT))
        ids = registry.create_run(description)
        registry.open_run(ids, description)
        record = example_record(description, 3, metrics={"loss": 1.0})
        manifest = encode(record)
        server.stop()
        with pytest.raises(RegistryError, match="did not take 3 rows"):
            registry.log_metrics(rows_of("loss", [3.0, 2.0, 1.0]))
        with pytest.raises(RegistryError, match="did not register step-00000003"):
            registry.register(record, uri="s3://bucket/x.json", manifest=manifest)
        with pytest.raises(RegistryError, match="did not search the run"):
            MlflowRegistry(RegistryConfig(tracking_uri=server.uri, experiment=EXPERIMENT)).find_run(
                description
            )
        server.start()
        registry.log_metrics(rows_of("loss", [3.0, 2.0, 1.0]))
        registry.register(record, uri="s3://bucket/x.json", manifest=manifest)
        assert_everything_once(server.uri, description.uid)


def test_server_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that accepts and stays silent ends the call by the time-out."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        registry = MlflowRegistry(RegistryConfig(tracking_uri=uri, experiment=EXPERIMENT))
        with pytest.raises(RegistryError, match="did not answer in time"):
            registry.find_run(described())
