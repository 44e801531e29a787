"""Tags of the orchestrator's run, for every MLflow run that a user starts inside it.

MLflow finds the provider by its entry point and asks it in ``mlflow.start_run``. So a run that
training code or an evaluation task makes by itself can be found by the flow run or DAG run it
belongs to. The tags have the names that the run of a `RunDescription` carries.
"""

from __future__ import annotations

import os

from mlflow.tracking.context.abstract_context import RunContextProvider

__all__ = ["OrchestratorContext", "orchestrator_tags"]

_VARIABLES = {
    "prefect.flow_run_id": "PREFECT__FLOW_RUN_ID",
    "airflow.dag_id": "AIRFLOW_CTX_DAG_ID",
    "airflow.dag_run_id": "AIRFLOW_CTX_DAG_RUN_ID",
    "airflow.task_id": "AIRFLOW_CTX_TASK_ID",
}


def orchestrator_tags() -> dict[str, str]:
    """Ids of the flow run or DAG run that this process belongs to, from its environment."""
    return {tag: value for tag, name in _VARIABLES.items() if (value := os.environ.get(name))}


class OrchestratorContext(RunContextProvider):
    """Provider of `orchestrator_tags`, in the group ``mlflow.run_context_provider``."""

    def in_context(self) -> bool:
        """Whether this process was started by an orchestrator."""
        return bool(orchestrator_tags())

    def tags(self) -> dict[str, str]:
        """The tags for a new run."""
        return orchestrator_tags()
