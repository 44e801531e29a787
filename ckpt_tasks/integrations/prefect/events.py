"""Prefect events of a training run, for automations and the event feed.

==============================================  ===========================================
``ckpt_tasks.attempt.resumed``                  an attempt knows where it starts
``ckpt_tasks.attempt.replayed``                 were steps done again alike
``ckpt_tasks.checkpoint.committed``             a checkpoint exists
``ckpt_tasks.checkpoint.registered``            the registry knows it
``ckpt_tasks.checkpoint.quarantined``           it was found damaged
``ckpt_tasks.checkpoint.save-failed``           a save did not become a checkpoint
==============================================  ===========================================

The resource is the checkpoint (the attempt, for ``attempt...``); related are the training
run, under the role ``training-run``, and what Prefect adds: flow run, flow, deployment, tags.

``ckpt_tasks.store.maintained``, of a maintenance flow, tells what was done about a store's runs.
"""

from __future__ import annotations

from typing import Any

import msgspec
from prefect.events import emit_event

from ckpt_tasks.events import (
    AttemptClaimed,
    AttemptResumed,
    CheckpointCommitted,
    CheckpointQuarantined,
    CheckpointRegistered,
    Event,
    MetricsReplayed,
    RegistryLinked,
    SaveFailed,
)

__all__ = ["EventPublisher"]

_CHECKPOINT_EVENTS: dict[type[Event], str] = {
    CheckpointCommitted: "committed",
    CheckpointRegistered: "registered",
    CheckpointQuarantined: "quarantined",
    SaveFailed: "save-failed",
}


class EventPublisher:
    """Turns events of one training run into Prefect's. Sending happens in the background.

    Parameters
    ----------
    run
        The training run's name.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._uid = ""
        self._registry_run: str | None = None

    def __call__(self, event: Event) -> None:
        """Send the event that fits, if there is one."""
        if isinstance(event, AttemptClaimed):
            self._uid = event.uid
        elif isinstance(event, RegistryLinked):
            self._registry_run = event.run_id
        elif isinstance(event, AttemptResumed):
            resource = f"ckpt_tasks.attempt.{self._uid}.{event.attempt}"
            self._emit("attempt.resumed", resource, f"attempt {event.attempt}", event)
        elif isinstance(event, MetricsReplayed):
            resource = f"ckpt_tasks.attempt.{self._uid}.{event.attempt}"
            self._emit("attempt.replayed", resource, f"attempt {event.attempt}", event)
        elif type(event) in _CHECKPOINT_EVENTS:
            checkpoint: str = event.checkpoint  # type: ignore[attr-defined]
            resource = f"ckpt_tasks.checkpoint.{self._uid}.{checkpoint}"
            kind = _CHECKPOINT_EVENTS[type(event)]
            self._emit(f"checkpoint.{kind}", resource, checkpoint, event)

    def _emit(self, what: str, resource: str, name: str, event: Event) -> None:
        payload: dict[str, Any] = msgspec.to_builtins(event)
        payload["run"] = self._run
        emit_event(
            event=f"ckpt_tasks.{what}",
            resource={"prefect.resource.id": resource, "prefect.resource.name": name},
            related=self._related(),
            payload=payload,
        )

    def _related(self) -> list[dict[str, str]]:
        related = [
            {
                "prefect.resource.id": f"ckpt_tasks.run.{self._uid}",
                "prefect.resource.role": "training-run",
                "prefect.resource.name": self._run,
            }
        ]
        if self._registry_run is not None:
            related.append(
                {
                    "prefect.resource.id": f"mlflow.run.{self._registry_run}",
                    "prefect.resource.role": "mlflow-run",
                    "prefect.resource.name": self._run,
                }
            )
        return related
