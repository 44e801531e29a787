"""`MlflowRegistry` keeps the contract on a database opened directly and on a real server."""

from __future__ import annotations

import math
import sys

import pytest
from mlflow import MlflowClient
from support.mlflow_server import MlflowServer

from ckpt_tasks.config import RegistryConfig
from ckpt_tasks.integrations.mlflow import MlflowRegistry
from ckpt_tasks.registry import RegistryRunIds, RunDescription, RunStatus
from ckpt_tasks.testing.registry import RegistryTests

EXPERIMENT = "contract"
_STATUS: dict[str, RunStatus] = {
    "RUNNING": "running",
    "FINISHED": "finished",
    "FAILED": "failed",
    "KILLED": "stopped",
}


class MlflowContract(RegistryTests):
    """Looks into MLflow with its own client."""

    uri: str

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri, registry_uri=self.uri)

    def open_registry(self) -> MlflowRegistry:
        return MlflowRegistry(RegistryConfig(tracking_uri=self.uri, experiment=EXPERIMENT))

    def run_ids(self, uid: str) -> list[str]:
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        assert experiment is not None
        runs = self.client.search_runs(
            [experiment.experiment_id], filter_string=f"tags.`ckpt.uid` = '{uid}'"
        )
        return [run.info.run_id for run in runs]

    def make_twin(self, description: RunDescription) -> RegistryRunIds:
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        assert experiment is not None
        run = self.client.create_run(
            experiment.experiment_id, run_name="twin", tags={"ckpt.uid": description.uid}
        )
        return RegistryRunIds(
            tracking_uri=self.uri,
            experiment_id=experiment.experiment_id,
            experiment=EXPERIMENT,
            run_id=run.info.run_id,
            registered_model=EXPERIMENT,
        )

    def status(self, run_id: str) -> RunStatus:
        return _STATUS[self.client.get_run(run_id).info.status]

    def rows(self, run_id: str, key: str) -> list[tuple[int, float]]:
        history = self.client.get_metric_history(run_id, key)
        return sorted((row.step, _read(row.value)) for row in history)

    def checkpoints(self, run_id: str) -> list[str]:
        found = []
        for version in self.client.search_model_versions(f"run_id = '{run_id}'"):
            model = self.client.get_logged_model(version.source.removeprefix("models:/"))
            found.append(model.tags["ckpt.checkpoint"])
        return sorted(found)

    def alias(self, alias: str) -> str | None:
        aliases = self.client.get_registered_model(EXPERIMENT).aliases
        return str(aliases[alias]) if alias in aliases else None

    def tag(self, run_id: str, name: str) -> str | None:
        return self.client.get_run(run_id).data.tags.get(f"ckpt.{name}")

    def note(self, run_id: str) -> str:
        return self.client.get_run(run_id).data.tags.get("mlflow.note.content", "")


def _read(value: float) -> float:
    return math.copysign(math.inf, value) if abs(value) >= sys.float_info.max else value


class TestMlflowDatabase(MlflowContract):
    @pytest.fixture(autouse=True)
    def _database(self, sqlite_uri: str) -> None:
        self.uri = sqlite_uri


class TestMlflowServer(MlflowContract):
    @pytest.fixture(autouse=True)
    def _server(self, mlflow_server: MlflowServer) -> None:
        self.uri = mlflow_server.uri
