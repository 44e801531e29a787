"""The manifest of a checkpoint as an artifact of its run: logged and removed."""

from __future__ import annotations

import logging

from mlflow import MlflowClient
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from ckpt_tasks.masking import mask_text

__all__ = ["log_manifest", "remove_manifest"]

_logger = logging.getLogger(__name__)


def log_manifest(client: MlflowClient, run_id: str, checkpoint: str, manifest: bytes) -> None:
    """Log the commit record's bytes; what was logged before is replaced."""
    client.log_text(run_id, manifest.decode(), f"{_folder(checkpoint)}/manifest.json")


def remove_manifest(client: MlflowClient, run_id: str, checkpoint: str) -> None:
    """Delete the artifact, if it is there. One that has to stay is told, and is no error.

    It is small, and who may write to an artifact store may not delete there everywhere. MLflow's
    client has no call for it; its artifact repositories have, a server's among them.
    """
    uri = client.get_run(run_id).info.artifact_uri
    try:
        artifacts = get_artifact_repository(uri, tracking_uri=client.tracking_uri)
        artifacts.delete_artifacts(_folder(checkpoint))  # type: ignore[no-untyped-call]
    except Exception as error:  # of any artifact store's own client
        said = mask_text(f"{type(error).__name__}: {error}")
        _logger.warning("the manifest of %s stays in MLflow: %s", checkpoint, said)


def _folder(checkpoint: str) -> str:
    return f"checkpoints/{checkpoint}"
