"""Which execution of which task this is, as a training run wants to know it."""

from __future__ import annotations

from airflow.sdk import Context

__all__ = ["invocation_of", "tags_of"]


def invocation_of(context: Context, task_id: str) -> str:
    """One triggered execution of a task: its retries share it, and so does a clear."""
    ti = context["ti"]
    return f"airflow:{ti.dag_id}/{task_id}/{ti.run_id}/{ti.map_index}"


def tags_of(context: Context) -> dict[str, str]:
    """Ids for the training run's attempts and its registry run."""
    ti = context["ti"]
    tags = {
        "airflow.dag_id": ti.dag_id,
        "airflow.run_id": ti.run_id,
        "airflow.task_id": ti.task_id,
        "airflow.try_number": str(ti.try_number),
    }
    if ti.map_index is not None and ti.map_index >= 0:
        tags["airflow.map_index"] = str(ti.map_index)
    return tags
