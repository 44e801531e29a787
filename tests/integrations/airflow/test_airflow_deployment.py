"""What is in ``deployments/airflow``: files that exist, settings that are, times that fit."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import dag_home  # noqa: F401 - before Airflow is imported

# isort: split
from airflow.sdk.configuration import conf

from ckpt_tasks.config import load_config

REPOSITORY = Path(__file__).parents[3]
FOLDER = REPOSITORY / "deployments" / "airflow"

# What is used here of the chart's values, by its parameters reference and, for `workers`, the
# release notes of 1.20.0.
CHART = {
    "airflowVersion": str,
    "config": dict,
    "dags": {
        "gitSync": {
            "enabled": bool,
            "repo": str,
            "branch": str,
            "subPath": str,
            "period": str,
            "credentialsSecret": str,
        }
    },
    "env": [{"name": str, "value": str}],
    "executor": str,
    "images": {"airflow": {"repository": str, "tag": str}},
    "secret": [{"envName": str, "secretName": str, "secretKey": str}],
    "triggerer": {"enabled": bool},
    "workers": {"kubernetes": {"terminationGracePeriodSeconds": int}},
}


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / "values.yaml").read_text())
    return loaded


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (FOLDER / "Dockerfile").read_text().replace("\\\n", " ")


def _check(value: Any, expected: Any, where: str) -> None:
    if isinstance(expected, type):
        assert isinstance(value, expected), where
    elif isinstance(expected, list):
        for number, item in enumerate(value):
            _check(item, expected[0], f"{where}[{number}]")
    else:
        assert set(value) <= set(expected), where
        for name, item in value.items():
            _check(item, expected[name], f"{where}.{name}")


def test_values_are_those_that_the_chart_has(values: dict[str, Any]) -> None:
    """Names and types, as far as they are used; the chart refuses others of these objects."""
    _check(values, CHART, "values")


def test_settings_are_those_that_airflow_has(values: dict[str, Any]) -> None:
    """A misspelt option would silently do nothing."""
    for section, options in values["config"].items():
        for option in options:
            assert conf.get(section, option, fallback=None) is not None, f"[{section}] {option}"


def test_environment_is_configuration_and_holds_no_credentials(values: dict[str, Any]) -> None:
    """Each variable is read by this package; secrets come from Kubernetes' secret."""
    variables = {item["name"]: item["value"] for item in values["env"]}

    config = load_config(environ=variables)

    assert config.registry.tracking_uri is not None
    assert all(item["envName"].startswith("AIRFLOW_CONN_") for item in values["secret"])
    assert len({item["secretKey"] for item in values["secret"]}) == len(values["secret"])


def test_pods_outlive_the_save(values: dict[str, Any]) -> None:
    """The grace period is longer than the trainer and the registrar may take together."""
    variables = {item["name"]: item["value"] for item in values["env"]}
    attempt = load_config(environ=variables).attempt
    grace = values["workers"]["kubernetes"]["terminationGracePeriodSeconds"]

    assert attempt.grace + attempt.drain < grace
    on_gpu = ast.parse((FOLDER / "train_on_gpu.py").read_text())
    (stated,) = (
        node.value
        for node in on_gpu.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "GRACE"
    )
    assert ast.literal_eval(stated) == grace


def test_what_the_image_copies_is_there(dockerfile: str) -> None:
    """Paths from the repository's root, from where it is built."""
    sources = [
        path
        for line in re.findall(r"^COPY (.*)$", dockerfile, re.MULTILINE)
        if "--from=" not in line
        for path in [part for part in line.split() if not part.startswith("--")][:-1]
    ]

    assert {"ckpt_tasks", "dags", "constraints.txt"} <= set(sources)
    assert [path for path in sources if not (REPOSITORY / path).exists()] == []


def test_versions_agree(dockerfile: str, values: dict[str, Any]) -> None:
    """Image, chart and what this repository is tested with are the same Airflow."""
    (built,) = re.findall(r"^ARG AIRFLOW_VERSION=(\S+)$", dockerfile, re.MULTILINE)
    constraints = (REPOSITORY / "constraints.txt").read_text()
    (tested,) = re.findall(r"^apache-airflow==(\S+)$", constraints, re.MULTILINE)

    assert built == values["airflowVersion"] == tested


def test_dags_use_the_interpreter_that_the_image_names(dockerfile: str) -> None:
    """Each shipped DAG that trains or evaluates does so in the environment that has torch."""
    assert "ENV CKPT_TASKS_DAGS_PYTHON=/opt/training/bin/python" in dockerfile
    shipped = [file for file in (REPOSITORY / "dags").glob("*.py") if file.name != "maintain.py"]
    for file in [*shipped, FOLDER / "train_on_gpu.py"]:
        assert "CKPT_TASKS_DAGS_PYTHON" in file.read_text(), file


def test_page_explains_every_setting(values: dict[str, Any]) -> None:
    """Who changes a value finds the reason for it."""
    page = (FOLDER / "README.md").read_text()
    settings = [
        "terminationGracePeriodSeconds",
        "gitSync",
        *(option for options in values["config"].values() for option in options),
    ]

    assert [name for name in settings if name not in page] == []
