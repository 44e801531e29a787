"""Two processes register one checkpoint at once: MLflow holds it once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from mlflow import MlflowClient
from support.mlflow_server import MlflowServer

from ckpt_tasks.config import RegistryConfig
from ckpt_tasks.errors import RegistryRefusedError
from ckpt_tasks.format.codec import encode
from ckpt_tasks.integrations.mlflow import MlflowRegistry, connection
from ckpt_tasks.registry import Registration, RunDescription
from ckpt_tasks.testing.registry import example_description, example_record, rows_of

EXPERIMENT = "races"


def client_that_meets(*calls: str) -> type[MlflowClient]:
    """A client whose first calls of these names wait for another's: whatever the callers looked
    for before, both have looked by then, and found nothing.
    """
    barriers = {call: threading.Barrier(2, timeout=120) for call in calls}

    class MeetingClient(MlflowClient):
        def __getattribute__(self, name: str) -> Any:
            found = super().__getattribute__(name)
            return _after(barriers[name], found) if name in barriers else found

    return MeetingClient


def _after(barrier: threading.Barrier, call: Callable[..., Any]) -> Callable[..., Any]:
    def meet(*arguments: Any, **named: Any) -> Any:
        barrier.wait()
        return call(*arguments, **named)

    return meet


def opened(uri: str, description: RunDescription) -> MlflowRegistry:
    registry = MlflowRegistry(RegistryConfig(tracking_uri=uri, experiment=EXPERIMENT))
    ids = registry.find_run(description) or registry.create_run(description)
    registry.open_run(ids, description)
    return registry


def register(registry: MlflowRegistry, description: RunDescription) -> Registration:
    record = example_record(description, 3, metrics={"loss": 1.0})
    registration = registry.register(record, uri="s3://bucket/x.json", manifest=encode(record))
    registry.set_alias(f"resume-{description.uid}", registration)
    return registration


def test_two_register_one_checkpoint(
    mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have looked for what they make before either makes it, and both get the same version
    for an answer: the lowest, with its alias; no other version and no other logged model stays.
    """
    uri, description = mlflow_server.uri, example_description()
    opened(uri, description).log_metrics(rows_of("loss", [3.0, 2.0, 1.0]))
    monkeypatch.setattr(
        connection, "MlflowClient", client_that_meets("create_logged_model", "create_model_version")
    )
    registries = [opened(uri, description) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(register, registry, description) for registry in registries]
        first, second = (answer.result() for answer in answers)
    assert first == second
    client = MlflowClient(uri, registry_uri=uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    of_uid = f"tags.`ckpt.uid` = '{description.uid}'"
    (model,) = client.search_logged_models([experiment.experiment_id], filter_string=of_uid)
    (version,) = client.search_model_versions(f"run_id = '{first.run_id}'")
    assert (first.model_id, first.version) == (model.model_id, str(version.version))
    assert client.get_model_version(version.name, version.version).aliases
    assert f'"version": {version.version}}}]' in model.tags["mlflow.modelVersions"]
    assert registries[0].registered() == {first.checkpoint: first}


def test_two_set_one_new_alias(mlflow_server: MlflowServer) -> None:
    """Both add it, of which MLflow's database may refuse one: it is there, and neither fails."""
    uri, description = mlflow_server.uri, example_description()
    registries = [opened(uri, description) for _ in range(2)]
    registration = register(registries[0], description)
    together = threading.Barrier(2, timeout=120)
    names = [f"new-{number}" for number in range(30)]

    def set_all(registry: MlflowRegistry) -> None:
        for name in names:
            together.wait()
            registry.set_alias(name, registration)

    with ThreadPoolExecutor(2) as pool:
        for answer in [pool.submit(set_all, registry) for registry in registries]:
            answer.result()
    client = MlflowClient(uri, registry_uri=uri)
    aliases = client.get_model_version(registration.registered_model, registration.version).aliases
    assert set(names) <= set(aliases)


def test_output_that_another_process_has_linked(mlflow_server: MlflowServer) -> None:
    """A process that has read the run's outputs before another added one completes its work."""
    uri, description = mlflow_server.uri, example_description()
    first = opened(uri, description)
    first.log_metrics(rows_of("loss", [3.0, 2.0, 1.0]))
    second = opened(uri, description)
    record = example_record(description, 2, metrics={"loss": 2.0})
    second.register(record, uri="s3://bucket/x.json", manifest=encode(record))
    client = MlflowClient(uri, registry_uri=uri)
    made = register(first, description)
    client.delete_model_version(made.registered_model, made.version)
    again = register(second, description)
    assert again.model_id == made.model_id
    outputs = client.get_run(made.run_id).outputs.model_outputs
    assert [output.model_id for output in outputs].count(made.model_id) == 1


def test_registered_model_deleted_meanwhile(mlflow_server: MlflowServer) -> None:
    """Deleted in MLflow during a training, the registered model is made again."""
    uri, description = mlflow_server.uri, example_description()
    registry = MlflowRegistry(
        RegistryConfig(tracking_uri=uri, experiment=EXPERIMENT, registered_model="deleted")
    )
    registry.open_run(registry.create_run(description), description)
    registry.log_metrics(rows_of("loss", [4.0, 3.0, 2.0, 1.0]))
    register(registry, description)
    MlflowClient(uri, registry_uri=uri).delete_registered_model("deleted")
    record = example_record(description, 4, metrics={"loss": 1.0})
    with pytest.raises(RegistryRefusedError, match="deleted"):
        registry.register(record, uri="s3://bucket/x.json", manifest=encode(record))
    again = registry.register(record, uri="s3://bucket/x.json", manifest=encode(record))
    assert (again.registered_model, again.version) == ("deleted", "1")
