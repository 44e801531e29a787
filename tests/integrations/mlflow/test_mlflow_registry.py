"""What people and programs find in MLflow, beyond the contract that all registries share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from support.mlflow_server import MlflowServer

from ckpt_tasks.config import RegistryConfig
from ckpt_tasks.errors import ConfigError, RegistryError
from ckpt_tasks.format.codec import encode
from ckpt_tasks.format.records import CommitRecord
from ckpt_tasks.integrations.mlflow import MlflowRegistry, checkpoints, history
from ckpt_tasks.registry import Registration, RunDescription
from ckpt_tasks.testing.registry import example_description, example_record, rows_of

URI = "s3://bucket/checkpoints/run/commits/step-00000100-a1-s1.json"


@pytest.fixture(params=["database", "server"])
def uri(request: pytest.FixtureRequest, sqlite_uri: str) -> str:
    if request.param == "database":
        return sqlite_uri
    server: MlflowServer = request.getfixturevalue("mlflow_server")
    return server.uri


@pytest.fixture
def client(uri: str) -> MlflowClient:
    return MlflowClient(uri, registry_uri=uri)


def opened(uri: str, description: RunDescription, **config: object) -> MlflowRegistry:
    """A registry with the description's run open."""
    values = {"experiment": "registry", **config}
    registry = MlflowRegistry(RegistryConfig(tracking_uri=uri, **values))  # type: ignore[arg-type]
    ids = registry.find_run(description) or registry.create_run(description)
    registry.open_run(ids, description)
    return registry


def registered(registry: MlflowRegistry, record: CommitRecord) -> Registration:
    return registry.register(record, uri=URI, manifest=encode(record))


def test_logged_model_tells_everything(uri: str, client: MlflowClient) -> None:
    """The logged model is named by its step, external, ready, an output of its run, and has
    position, size, digest, URI, time and hyperparameters as params, and metrics to sort by.
    """
    description = example_description(hyperparameters={"lr": 0.001, "step": 7})
    registry = opened(uri, description)
    registry.log_metrics([*rows_of("loss", [0.5], first_step=100), *rows_of("acc", [0.9])])
    record = example_record(description, 100, metrics={"loss": 0.5, "acc": 0.9})
    registration = registered(registry, record)
    model = client.get_logged_model(registration.model_id)
    assert (model.name, model.model_type, model.status) == ("step-00000100", "checkpoint", "READY")
    assert model.source_run_id == registration.run_id
    assert model.tags["mlflow.model.isExternal"] == "true"
    expected = {"epoch": "1", "step": "100", "bytes": "3412345", "size": "3.41 MB", "uri": URI}
    expected |= {"checkpoint": record.id, "committed_at": record.created_at, "trigger": "steps"}
    expected |= {"lr": "0.001", "hparam.step": "7"}
    assert expected.items() <= model.params.items()
    assert len(model.params["digest"]) == 64
    shown = {metric.key: (metric.value, metric.step) for metric in model.metrics}
    assert shown == {
        "loss": (0.5, 100),
        "acc": (0.9, 1),
        "ckpt/epoch": (1.0, 100),
        "ckpt/bytes": (3412345.0, 100),
    }
    outputs = client.get_run(registration.run_id).outputs.model_outputs
    assert [(output.model_id, output.step) for output in outputs] == [(model.model_id, 100)]
    links = [{"name": "registry", "version": int(registration.version)}]
    assert json.loads(model.tags["mlflow.modelVersions"]) == links

    # Somebody has written something else there; it is set right by the next one who registers.
    for broken in ("{", "[1]", '[{"name": 3}]'):
        client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": broken})
        assert registered(registry, record) == registration
        model = client.get_logged_model(registration.model_id)
        assert json.loads(model.tags["mlflow.modelVersions"]) == links


@pytest.mark.parametrize("store", ["file:///data/runs", "s3://bucket/runs", "memory://runs"])
def test_any_store(uri: str, client: MlflowClient, store: str) -> None:
    """Checkpoints of every kind of store are registered, also where a server refuses such a URI
    as a version's source.
    """
    description = example_description(store_url=store)
    record = example_record(description, 100)
    registration = opened(uri, description).register(
        record, uri=f"{store}/x.json", manifest=encode(record)
    )
    assert client.get_logged_model(registration.model_id).params["uri"] == f"{store}/x.json"


def test_version_has_few_tags_in_order(uri: str, client: MlflowClient) -> None:
    """A version's tags are run, epoch, step, trigger and the first hyperparameters; size, time,
    digest and URI are in its description.
    """
    many = {f"h{n}": n for n in range(9)}
    description = example_description(hyperparameters=many)
    registration = registered(opened(uri, description), example_record(description, 100))
    version = client.get_model_version("registry", registration.version)
    assert version.source == f"models:/{registration.model_id}"
    assert version.run_id == registration.run_id
    expected = ["ckpt.run", "ckpt.epoch", "ckpt.step", "ckpt.trigger"]
    assert list(version.tags) == [*expected, "hparam.h0", "hparam.h1", "hparam.h2"]
    assert version.tags["ckpt.run"] == description.run
    for part in ("3.41 MB (3,412,345 bytes)", "2026-11-21T10:05:03.123Z", URI, "Digest", "h8"):
        assert part in version.description


def test_chosen_hyperparameters_are_tags(uri: str, client: MlflowClient) -> None:
    """Configured hyperparameters become tags; one that the run lacks is left out."""
    description = example_description()
    registry = opened(uri, description, hyperparameter_tags=["epochs", "missing"])
    registration = registered(registry, example_record(description, 100))
    tags = client.get_model_version("registry", registration.version).tags
    assert {name: tags[name] for name in tags if name.startswith("hparam.")} == {
        "hparam.epochs": "20"
    }


def test_registered_model_is_one_per_project(uri: str, client: MlflowClient) -> None:
    """Runs of one experiment share a registered model; a name that MLflow refuses is changed."""
    model = f"my/project: {os.path.basename(uri)}"
    names = set()
    for _ in range(2):
        description = example_description()
        registry = opened(uri, description, registered_model=model)
        names.add(registered(registry, example_record(description, 100)).registered_model)
    assert names == {model.replace("/", "-").replace(":", "-")}


def test_manifest_is_an_artifact(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    """The run holds the commit record's exact bytes as ``checkpoints/<id>/manifest.json``, until
    the checkpoint is forgotten.
    """
    description = example_description()
    registry = opened(uri, description)
    record = example_record(description, 100, reason="über 100 steps")
    gone = example_record(description, 50)
    registered(registry, gone)
    registration = registered(registry, record)
    registry.forget(gone.id)
    left = [artifact.path for artifact in client.list_artifacts(registration.run_id, "checkpoints")]
    assert left == [f"checkpoints/{record.id}"]
    path = client.download_artifacts(
        registration.run_id, f"checkpoints/{record.id}/manifest.json", str(tmp_path)
    )
    assert Path(path).read_bytes() == encode(record)


def test_run_shows_params_and_ids(uri: str, client: MlflowClient) -> None:
    """The run is named, has its hyperparameters as params, and the orchestrator's ids as tags."""
    description = example_description()
    ids = opened(uri, description).find_run(description)
    assert ids is not None
    run = client.get_run(ids.run_id)
    assert run.info.run_name == description.run
    assert run.data.params == {"lr": "0.001", "epochs": "20", "optimizer.name": "adamw"}
    assert run.data.tags["prefect.flow_run_id"] == description.tags["prefect.flow_run_id"]
    assert run.data.tags["ckpt.store"] == description.store_url
    assert run.data.tags["mlflow.source.name"] == "toy.training:train"
    assert run.data.tags["mlflow.source.type"] == "LOCAL"


def test_changed_hyperparameters_are_kept_in_order(uri: str, client: MlflowClient) -> None:
    """The first value stays the param; each change is one more, and repeating adds none."""
    description = example_description(hyperparameters={"lr": 0.1})
    for lr in (0.1, 0.01, 0.01, 0.1):
        changed = example_description(
            uid=description.uid, run=description.run, hyperparameters={"lr": lr}
        )
        ids = opened(uri, changed).find_run(changed)
    assert ids is not None
    assert client.get_run(ids.run_id).data.params == {
        "lr": "0.1",
        "lr.changed-1": "0.01",
        "lr.changed-2": "0.1",
    }


def test_listing_is_paged(uri: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """All checkpoints are listed where they take several pages, each of them once."""
    monkeypatch.setattr(checkpoints, "_PAGE", 2)
    description = example_description()
    registry = opened(uri, description)
    expected = {}
    for step in (100, 200, 300, 400, 500):
        registration = registered(registry, example_record(description, step))
        expected[registration.checkpoint] = registration
    assert registry.registered() == expected


def test_half_registered_is_not_listed(
    uri: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint without a version is not listed, and listed once it is completed."""
    description = example_description()
    registry = opened(uri, description)
    record = example_record(description, 100)

    def refuse(*args: object, **kwargs: object) -> None:
        raise MlflowException("no more versions today")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_model_version", refuse)
        with pytest.raises(RegistryError, match="no more versions today"):
            registered(registry, record)
        assert registry.registered() == {}
    assert registry.registered() == {} != {record.id: registered(registry, record)}
    assert list(registry.registered()) == [record.id]


def test_best_is_compared_by_the_checkpoints_own_value(uri: str, client: MlflowClient) -> None:
    """A step done again keeps the run's first row, so the logged model shows no metric; its
    checkpoint's own value is known all the same, and not once the logged model is deleted.
    """
    description = example_description()
    registry = opened(uri, description, registered_model="by value", best="loss:min")
    registry.log_metrics(rows_of("loss", [0.5], first_step=100))
    record = example_record(description, 100, metrics={"loss": 0.25})
    registration = registered(registry, record)
    registry.set_alias("best", registration)
    other = opened(uri, example_description(), registered_model="by value")
    held = other.alias_holder("best", "loss")
    assert held is not None
    assert (held.checkpoint, held.value) == (record.id, 0.25)
    client.delete_logged_model(registration.model_id)
    assert other.alias_holder("best", "loss") is None


def test_a_version_that_is_no_checkpoint_has_no_value(uri: str, client: MlflowClient) -> None:
    """Somebody may have pointed the alias at a model of their own."""
    registry = opened(uri, example_description(), registered_model="mixed")
    client.create_registered_model("mixed")
    version = client.create_model_version("mixed", source="s3://bucket/model")
    client.set_registered_model_alias("mixed", "best", version.version)
    held = registry.alias_holder("best", "loss")
    assert held is not None
    assert (held.checkpoint, held.value) == (None, None)


def test_note_keeps_the_users_text(uri: str, client: MlflowClient) -> None:
    """What a user wrote into the run's description survives ours."""
    description = example_description()
    registry = opened(uri, description)
    ids = registry.find_run(description)
    assert ids is not None
    client.set_tag(ids.run_id, "mlflow.note.content", "My own notes.")
    registry.write_note("Attempt 1 began.")
    registry.write_note("Attempt 2 began.")
    note = client.get_run(ids.run_id).data.tags["mlflow.note.content"]
    assert note.startswith("My own notes.")
    assert "Attempt 2" in note
    assert "Attempt 1" not in note


def test_end_time_is_kept(uri: str, client: MlflowClient) -> None:
    """Repeating the status of the end does not move the end."""
    description = example_description()
    registry = opened(uri, description)
    ids = registry.find_run(description)
    assert ids is not None
    registry.end_run("failed")
    before = client.get_run(ids.run_id).info.end_time
    registry.end_run("failed")
    assert client.get_run(ids.run_id).info.end_time == before is not None


def test_alias_is_not_written_twice(
    uri: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Setting an alias where it points already writes nothing."""
    description = example_description()
    registry = opened(uri, description)
    registration = registered(registry, example_record(description, 100))
    registry.set_alias("best", registration)
    written: list[object] = []
    monkeypatch.setattr(
        MlflowClient, "set_registered_model_alias", lambda *args: written.append(args)
    )
    registry.set_alias("best", registration)
    assert written == []


def delete_run(client: MlflowClient, run_id: str, experiment_id: str) -> None:
    client.delete_run(run_id)


def delete_experiment(client: MlflowClient, run_id: str, experiment_id: str) -> None:
    client.delete_experiment(experiment_id)


@pytest.mark.parametrize(
    ("delete", "restore", "says"),
    [
        (delete_run, "restore_run", "mlflow runs restore"),
        (delete_experiment, "restore_experiment", "mlflow experiments restore"),
    ],
)
def test_deleted_in_mlflow(
    uri: str,
    client: MlflowClient,
    delete: Callable[[MlflowClient, str, str], None],
    restore: str,
    says: str,
) -> None:
    """A run or experiment that somebody deleted is not made anew: the error says how to restore
    it, and then everything goes on.
    """
    description = example_description()
    config = RegistryConfig(tracking_uri=uri, experiment=f"deleted {description.uid}")
    registry = MlflowRegistry(config)
    ids = registry.create_run(description)
    registry.open_run(ids, description)
    delete(client, ids.run_id, ids.experiment_id)
    again = MlflowRegistry(config)
    with pytest.raises(RegistryError, match=says):
        again.open_run(ids, description)
    with pytest.raises(RegistryError):
        registry.log_metrics(rows_of("loss", [1.0]))
    getattr(client, restore)(ids.run_id if restore == "restore_run" else ids.experiment_id)
    again.open_run(ids, description)
    assert again.find_run(description) == ids


def test_run_of_another_server(uri: str) -> None:
    """Ids that the server does not know raise an error that names the file to delete."""
    description = example_description()
    registry = opened(uri, description)
    ids = registry.find_run(description)
    assert ids is not None
    unknown = msgspec.structs.replace(ids, run_id="0" * 32)
    with pytest.raises(RegistryError, match=r"does not exist.*reconcile"):
        registry.open_run(unknown, description)


def test_nothing_is_printed_and_no_file_strays(uri: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A whole life prints nothing and leaves nothing in the working directory."""
    description = example_description()
    registry = opened(uri, description, experiment=f"quiet {description.uid}")
    registered(registry, example_record(description, 100))
    registry.end_run("finished")
    assert capfd.readouterr().out == ""
    assert os.listdir() == []


def test_environment_is_left_alone(sqlite_uri: str) -> None:
    """Registering in a database leaves the process's tracking URI as it was."""
    description = example_description()
    registered(opened(sqlite_uri, description), example_record(description, 100))
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_without_tracking_uri() -> None:
    """A missing tracking URI is refused at once."""
    with pytest.raises(ConfigError, match=r"registry\.tracking_uri is not set"):
        MlflowRegistry(RegistryConfig())


@pytest.mark.parametrize("uri", ["gopher://example.org", "mlruns"])
def test_unusable_tracking_uri(uri: str) -> None:
    """A tracking URI that MLflow cannot open is refused as configuration, not retried."""
    registry = MlflowRegistry(RegistryConfig(tracking_uri=uri))
    with pytest.raises(ConfigError, match=f"tracking_uri = '{uri}'.*give the URL"):
        registry.find_run(example_description())


def test_credentials_stay_out_of_errors_and_ids(mlflow_server: MlflowServer) -> None:
    """A password in the tracking URI is neither in an error's text nor in the run's ids."""
    host = mlflow_server.uri.removeprefix("http://")
    description = example_description()
    registry = MlflowRegistry(RegistryConfig(tracking_uri=f"http://me:hunter2@{host}"))
    ids = registry.create_run(description)
    registry.open_run(ids, description)
    assert "hunter2" not in repr(ids) + repr(registry.links(None))
    unreachable = MlflowRegistry(RegistryConfig(tracking_uri="http://me:hunter2@127.0.0.1:9"))
    with pytest.raises(RegistryError) as caught:
        unreachable.find_run(description)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None or "hunter2" not in str(caught.value.__cause__)


def test_history_of_a_server_that_knows_no_ranges(
    mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole history is read then, and what is not asked for left out."""
    monkeypatch.setattr(history, "_ENDPOINT", "/api/2.0/mlflow/metrics/no-such-page")
    registry = opened(mlflow_server.uri, example_description())
    registry.log_metrics(rows_of("loss", [0.5, 0.25, 0.125, 0.0625]))
    for _ in range(2):
        assert [row.value for row in registry.history("loss", 1, 3)] == [0.25, 0.125]
