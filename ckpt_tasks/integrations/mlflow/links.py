"""Addresses of pages in MLflow's web interface (its routes as of version 3.17)."""

from __future__ import annotations

from urllib.parse import quote

from ckpt_tasks.registry import Registration, RegistryRunIds

__all__ = ["page_links"]

# Without it a browser that has not chosen yet opens the pages for language-model apps.
_QUERY = "?workflowType=machine_learning"


def page_links(
    server: str, ids: RegistryRunIds, registration: Registration | None
) -> dict[str, str]:
    """Pages of the run, and of a checkpoint: ``run``, ``model``, ``version``.

    Parameters
    ----------
    server
        URL of the MLflow server, without userinfo.
    ids
        Of the run.
    registration
        Of the checkpoint, if its pages are wanted.
    """
    pages = f"{server.rstrip('/')}/#"
    experiment = f"{pages}/experiments/{quote(ids.experiment_id, safe='')}"
    links = {"run": f"{experiment}/runs/{quote(ids.run_id, safe='')}{_QUERY}"}
    if registration is not None:
        name = quote(registration.registered_model, safe="")
        links["model"] = f"{experiment}/models/{quote(registration.model_id, safe='')}{_QUERY}"
        links["version"] = f"{pages}/models/{name}/versions/{registration.version}{_QUERY}"
    return links
