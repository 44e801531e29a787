"""Automations that bring a crashed flow run back, under the id it had.

Prefect's own retries do not cover **Crashed**: the flow's process is gone, and its retries with
it. Two automations on the server close the gap:

- a crashed flow run is scheduled again, under the same id, so that its training run goes on;
- a flow run whose heartbeats stop, because its machine or runner is gone too, is marked crashed,
  which sets off the first.

Both look at flow runs that carry the tag `TAG` only. Nothing in Prefect bounds how often they
act; `AttemptConfig.without_commit` does: a training run that dies again and again without a new
checkpoint ends as Failed, which neither automation looks at. A flow run that crashed before it
began (a broken import, say) is left alone, for it would crash for ever.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from prefect.automations import Automation, AutomationCore, EventTrigger, Posture
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState

from ckpt_tasks.errors import ConfigError

__all__ = ["CRASHED", "HEARTBEAT", "MIN_HEARTBEAT_TIMEOUT", "TAG", "install_automations"]

TAG = "ckpt-tasks"
"""Carried by the deployments, and so the flow runs, that the automations look after."""

CRASHED = "ckpt-tasks: reschedule crashed flow runs"
HEARTBEAT = "ckpt-tasks: mark silent flow runs as crashed"

MIN_HEARTBEAT_TIMEOUT = 31.0
"""Prefect sends heartbeats every 30 seconds at most."""

_TAGGED: dict[str, str | list[str]] = {
    "prefect.resource.id": f"prefect.tag.{TAG}",
    "prefect.resource.role": "tag",
}
_ENDED = ("Completed", "Failed", "Cancelled", "Crashed")


def install_automations(*, heartbeat_timeout: float = 90.0) -> dict[str, str]:
    """Make both automations on the server that this process is configured for.

    Calling it again changes nothing, or brings them up to date.

    Parameters
    ----------
    heartbeat_timeout
        Seconds without a heartbeat after which a flow run counts as crashed. Flow runs send
        heartbeats where ``PREFECT_FLOWS_HEARTBEAT_FREQUENCY`` is set (30 is Prefect's least);
        three times that is a sensible timeout.

    Returns
    -------
    dict
        Name of each automation -> ``"created"``, ``"updated"`` or ``"unchanged"``.

    Raises
    ------
    ConfigError
        The timeout is shorter than the time between two heartbeats can be.
    """
    if heartbeat_timeout < MIN_HEARTBEAT_TIMEOUT:
        raise ConfigError(
            f"a heartbeat timeout of {heartbeat_timeout:g} s would mark healthy flow runs as "
            f"crashed: heartbeats come every 30 s; use at least {MIN_HEARTBEAT_TIMEOUT:g}"
        )
    with get_client(sync_client=True) as client:
        return {
            automation.name: _install(client, automation)
            for automation in (_reschedule_crashed(), _mark_silent(heartbeat_timeout))
        }


def _reschedule_crashed() -> AutomationCore:
    return AutomationCore(
        name=CRASHED,
        description="Runs a crashed flow run again under the same id; its training resumes.",
        trigger=EventTrigger(
            expect={"prefect.flow-run.Crashed"},
            match={"prefect.resource.id": "prefect.flow-run.*", "prefect.run-count": "!0"},
            match_related=_TAGGED,
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.SCHEDULED,
                name="AwaitingRetry",
                message="The flow run crashed; training resumes from its last checkpoint.",
                force=False,
            )
        ],
    )


def _mark_silent(timeout: float) -> AutomationCore:
    heartbeat = "prefect.flow-run.heartbeat"
    return AutomationCore(
        name=HEARTBEAT,
        description="Marks a flow run as crashed when its heartbeats have stopped.",
        trigger=EventTrigger(
            after={heartbeat},
            expect={heartbeat, *(f"prefect.flow-run.{name}" for name in _ENDED)},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related=_TAGGED,
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=timeout),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                name="Crashed",
                message=f"No heartbeat for {timeout:g} seconds.",
                force=False,
            )
        ],
    )


def _install(client: SyncPrefectClient, wanted: AutomationCore) -> str:
    existing = client.read_automations_by_name(name=wanted.name)
    if not existing:
        client.create_automation(wanted)
        return "created"
    newest, *others = existing
    for double in others:
        client.delete_automation(double.id)
    if _content(newest) == _content(wanted):
        return "unchanged"
    client.update_automation(newest.id, wanted)
    return "updated"


def _content(automation: AutomationCore | Automation) -> dict[str, Any]:
    """What an automation does, without what the server adds: ids, owner, times."""
    content = automation.model_dump(
        mode="json", include={"name", "description", "enabled", "trigger", "actions"}
    )
    return {key: _comparable(value) for key, value in content.items()}


def _comparable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _comparable(item) for key, item in value.items() if key != "id"}
    if isinstance(value, list):
        items = [_comparable(item) for item in value]
        return sorted(items) if all(isinstance(item, str) for item in items) else items
    return value
