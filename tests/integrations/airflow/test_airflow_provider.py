"""What Airflow's own discovery finds of this package."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from importlib.resources import files

import jsonschema
import pytest
from support import dag_home  # noqa: F401 - before Airflow is imported

# isort: split
from airflow.api_fastapi.core_api.services.ui.connections import HookMetaService
from airflow.providers_manager import ProvidersManager
from airflow.sdk import BaseHook, task
from airflow.sdk.providers_manager_runtime import ProvidersManagerTaskRuntime

from ckpt_tasks.integrations import airflow as integration
from ckpt_tasks.integrations.airflow.hooks import CheckpointHook, MlflowHook
from ckpt_tasks.integrations.airflow.provider import get_provider_info


@pytest.fixture(scope="module")
def providers() -> ProvidersManager:
    return ProvidersManager()


def test_provider_info_is_as_airflow_wants_it() -> None:
    """It validates against the schema that comes with Airflow; every key is one that it knows."""
    schema = json.loads(files("airflow").joinpath("provider_info.schema.json").read_text())
    info = get_provider_info()

    jsonschema.validate(info, schema)
    assert set(info) - {"versions"} <= set(schema["properties"])


def test_provider_is_installed(providers: ProvidersManager) -> None:
    """Airflow finds it by its entry point, under the package's name and version."""
    (entry,) = (
        found
        for found in entry_points(group="apache_airflow_provider")
        if found.dist is not None and found.dist.name == "ckpt-tasks"
    )

    assert entry.load() is get_provider_info
    assert "ckpt-tasks" in providers.providers


@pytest.mark.parametrize(
    ("kind", "hook", "attribute"),
    [
        ("ckpt_tasks", CheckpointHook, "ckpt_conn_id"),
        ("mlflow", MlflowHook, "mlflow_conn_id"),
    ],
)
def test_connections_give_their_hooks(
    kind: str, hook: type, attribute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection of the type has the hook, made with its id, and can be tested in the UI."""
    found = ProvidersManagerTaskRuntime().hooks[kind]
    assert found is not None
    assert (found.connection_id_attribute_name, found.connection_testable) == (attribute, True)

    monkeypatch.setenv("AIRFLOW_CONN_ONE", f"{kind.replace('_', '-')}://somewhere")
    made = BaseHook.get_hook("one")

    assert type(made) is hook
    assert getattr(made, attribute) == "one"


@pytest.mark.parametrize(
    ("kind", "host", "extras"),
    [
        ("ckpt_tasks", "Root of the store", {"storage_conn_id", "single_writer"}),
        ("mlflow", "Tracking URI", {"token", "insecure_tls"}),
    ],
)
def test_connection_forms_have_their_fields(kind: str, host: str, extras: set[str]) -> None:
    """As the API server describes them to the UI: labels, and a field for each extra."""
    (form,) = (m for m in HookMetaService.hook_meta_data() if m.connection_type == kind)

    assert form.standard_fields is not None
    assert form.standard_fields.host is not None
    assert form.standard_fields.host.title == host
    assert set(form.extra_fields or {}) == extras


def test_form_s_token_is_hidden() -> None:
    """The UI shows it as a password."""
    (form,) = (m for m in HookMetaService.hook_meta_data() if m.connection_type == "mlflow")

    assert (form.extra_fields or {})["token"]["schema"]["format"] == "password"


def test_links_and_decorator_are_found(providers: ProvidersManager) -> None:
    """The API server resolves links by class name, the DAG file the decorator by attribute."""
    assert {
        "ckpt_tasks.integrations.airflow.links.MlflowRunLink",
        "ckpt_tasks.integrations.airflow.links.MlflowModelVersionLink",
        "ckpt_tasks.integrations.airflow.links.DashboardLink",
    } <= set(providers.extra_links_class_names)
    assert task.resumable_training is integration.resumable_training_task


def test_public_names_are_offered_late() -> None:
    """Each can be imported; another name is told."""
    for name in integration.__all__:
        assert getattr(integration, name) is not None
    with pytest.raises(AttributeError, match="TrainOperater"):
        integration.TrainOperater  # noqa: B018
