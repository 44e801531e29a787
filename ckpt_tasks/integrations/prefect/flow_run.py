"""What a resumable flow does about its own flow run on the server."""

from __future__ import annotations

from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.context import FlowRunContext
from prefect.states import Crashed

from ckpt_tasks.errors import ConfigError
from ckpt_tasks.integrations.prefect.automations import TAG

__all__ = ["adopt_flow_run", "current_flow_run", "flow_run_tags"]

_RUNNING = TaskRunFilterState(type=TaskRunFilterStateType(any_=[StateType.RUNNING]), name=None)


def current_flow_run() -> FlowRun:
    """The flow run that this code runs in. Raises `ConfigError` outside of one."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        raise ConfigError("a resumable flow's steps run inside its flow run only")
    return context.flow_run


def adopt_flow_run() -> FlowRun:
    """Make the flow run one that can come back after a crash, and tidy what a crash left.

    A deployed flow run gets the tag that the automations look for, should its deployment lack
    it; one without a deployment does not, for nothing could execute it again. Task runs that an
    earlier execution of this flow run left Running are marked as crashed: nobody else does.
    """
    flow_run = current_flow_run()
    with get_client(sync_client=True) as client:
        if flow_run.deployment_id is not None and TAG not in flow_run.tags:
            client.update_flow_run(flow_run.id, tags=[*flow_run.tags, TAG])
        if flow_run.run_count > 1:
            for left in client.read_task_runs(
                flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id])),
                task_run_filter=TaskRunFilter(state=_RUNNING),
            ):
                gone: State[Any] = Crashed(message="The process of the flow run was gone.")
                client.set_task_run_state(left.id, gone, force=True)
    return flow_run


def flow_run_tags(flow_run: FlowRun) -> dict[str, str]:
    """Ids for the training run's attempts and its registry run."""
    tags = {
        "prefect.flow_run_id": str(flow_run.id),
        "prefect.flow_run_name": flow_run.name,
        "prefect.flow_id": str(flow_run.flow_id),
    }
    if flow_run.deployment_id is not None:
        tags["prefect.deployment_id"] = str(flow_run.deployment_id)
    return tags
