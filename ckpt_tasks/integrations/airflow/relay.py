"""What happens in an attempt, shown in Airflow: log lines, links, and the task's state store."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from airflow.sdk import BaseOperator, Context

from ckpt_tasks import events, tasks
from ckpt_tasks.integrations.airflow.assets import names_of
from ckpt_tasks.integrations.airflow.links import PageLink
from ckpt_tasks.training.spec import TrainSpec

__all__ = ["STATE_KEY", "Relay"]

STATE_KEY = "ckpt_tasks"
"""Key in the task's state store under which the newest checkpoint stands."""

_PROGRESS_INTERVAL = 10.0


class Relay:
    """An `EventSink` for one try of a task.

    What goes wrong in showing an event is logged and stops no training.

    Parameters
    ----------
    operator
        Whose log is written.
    context
        Of the try.
    spec
        What is trained.
    links
        Filled with pages about the run, for when Airflow asks for them at the task's end.
    clock
        Seconds, monotonic; progress is logged every ten seconds.
    """

    def __init__(
        self,
        operator: BaseOperator,
        context: Context,
        spec: TrainSpec,
        links: dict[str, str],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._operator = operator
        self._log = operator.log
        self._ti = context["ti"]
        self._state = context.get("task_state_store")
        self._links = links
        page = spec.config.dashboard.page(spec.run)
        self._dashboard = {"dashboard": page} if page else {}
        self._clock = clock
        self._shown_at: float | None = None
        self._pointer: dict[str, Any] = {"run": spec.run}
        self.registered: dict[str, str] = {}
        """What the registry calls the newest registered checkpoint."""

    def __call__(self, event: events.Event) -> None:
        """Show `event`."""
        line = self._progress(event) or tasks.narrate(event)
        if line is not None:
            self._log.log(*line)
        try:
            self._keep(event)
        except Exception:
            self._log.warning("could not show %s", type(event).__name__, exc_info=True)

    def show_found(self, found: tasks.FoundCheckpoint | None) -> None:
        """Show what the registry has of a checkpoint that no event has told of."""
        if found is not None and found.registration is not None:
            self.registered.update(names_of(found.registration))
            self._link(found.links)

    def _progress(self, event: events.Event) -> tuple[int, str] | None:
        if not isinstance(event, events.Progress):
            return None
        now = self._clock()
        if self._shown_at is not None and now - self._shown_at < _PROGRESS_INTERVAL:
            return None
        self._shown_at = now
        of = f" of {event.epochs}" if event.epochs is not None else ""
        position = event.position
        return logging.INFO, f"epoch {position.epoch + 1}{of}, step {position.step}"

    def _keep(self, event: events.Event) -> None:
        match event:
            case events.AttemptClaimed():
                self._link(self._dashboard)
                self._point(uid=event.uid, attempt=event.attempt)
            case events.RunFoundComplete():
                self._link(self._dashboard)
            case events.AttemptResumed():
                self._point(checkpoint=event.checkpoint, step=event.position.step)
            case events.CheckpointCommitted():
                self._point(checkpoint=event.checkpoint, step=event.position.step)
            case events.RegistryLinked():
                self.registered["mlflow_run_id"] = event.run_id
                self._link(event.links)
            case events.CheckpointRegistered():
                self.registered.update(
                    model_id=event.model_id,
                    registered_model=event.registered_model,
                    version=event.version,
                )
                self._link(event.links)

    def _point(self, **values: Any) -> None:
        """Keep where the run stands where Airflow's pages and API show it."""
        self._pointer.update(values)
        if self._state is not None:
            self._state.set(STATE_KEY, dict(self._pointer))

    def _link(self, links: dict[str, str]) -> None:
        """At once, not when the task has ended: it may be killed, and people look meanwhile."""
        for link in self._operator.operator_extra_links:
            if isinstance(link, PageLink) and link.page in links:
                url = links[link.page]
                if url != self._links.get(link.page):
                    self._ti.xcom_push(key=link.xcom_key, value=url)
        self._links.update(links)
