"""The steps of a resumable flow as Prefect tasks. What they do is in `ckpt_tasks.tasks`.

No result is persisted, so none is pickled, and none is found again in a cache by the next
execution of the same flow run: the store is what remembers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.logging import get_run_logger

from ckpt_tasks import tasks
from ckpt_tasks.checkpointer.verify import VerifyReport
from ckpt_tasks.config import CheckpointConfig
from ckpt_tasks.errors import CheckpointNotFoundError, CorruptCheckpointError
from ckpt_tasks.events import Event, EventSink
from ckpt_tasks.integrations.prefect.artifacts import ArtifactPublisher, artifact_key
from ckpt_tasks.integrations.prefect.events import EventPublisher
from ckpt_tasks.integrations.prefect.flow_run import adopt_flow_run, current_flow_run, flow_run_tags
from ckpt_tasks.masking import mask_url
from ckpt_tasks.sizes import readable_size
from ckpt_tasks.tasks import Promotion, RecoveryReport, RetentionReport, Row, RunReport
from ckpt_tasks.training.spec import TrainOutcome, TrainSpec

__all__ = [
    "PATIENT",
    "apply_retention",
    "promote_checkpoint",
    "publish_report",
    "recover_run",
    "resolve_run",
    "train_run",
    "verify_checkpoint",
]

_Logger = logging.Logger | logging.LoggerAdapter[Any]


def _is_worth_retrying(_task: object, _run: TaskRun, state: State[Any]) -> bool:
    return not isinstance(state.data, BaseException) or tasks.is_worth_retrying(state.data)


def _is_away(_task: object, _run: TaskRun, state: State[Any]) -> bool:
    """Whether storage or registry may answer later. Damage stays, and is much to read again."""
    return _is_worth_retrying(_task, _run, state) and not isinstance(
        state.data, CorruptCheckpointError
    )


# Storage or registry may be away for a moment; the train step's own retries are the author's.
PATIENT: Any = {
    "persist_result": False,
    "cache_policy": NO_CACHE,
    "retries": 3,
    "retry_delay_seconds": [5.0, 20.0, 60.0],
    "retry_condition_fn": _is_away,
}


@task(name="resolve run", **PATIENT)
def resolve_run(
    entrypoint: str,
    run: str,
    params: Mapping[str, Any],
    config: CheckpointConfig,
    resume: str,
    python: str | None,
) -> TrainSpec:
    """Check the function, its hyperparameters and the store before anything is started."""
    flow_run = adopt_flow_run()
    spec = tasks.resolve(
        entrypoint,
        run=run,
        params=params,
        config=config,
        invocation=str(flow_run.id),
        resume=resume,
        tags=flow_run_tags(flow_run),
        python=python,
    )
    get_run_logger().info("training run %r in store %s", run, mask_url(config.store.url))
    return spec


@task(name="recover", **PATIENT)
def recover_run(spec: TrainSpec) -> RecoveryReport:
    """Report what training would start from, verified. The train step picks again by itself."""
    found = tasks.recover(spec)
    logger = get_run_logger()
    logger.info("%s: %s", found, found.why)
    for passed in found.passed_over:
        logger.warning("passed over: %s", passed)
    return found


@task(
    name="train",
    persist_result=False,
    cache_policy=NO_CACHE,
    retry_condition_fn=_is_worth_retrying,
)
def train_run(spec: TrainSpec) -> TrainOutcome:
    """One attempt in a supervised process; each retry resumes from the newest checkpoint."""
    logger = get_run_logger()
    context = TaskRunContext.get()
    artifacts = ArtifactPublisher(
        spec.run,
        current_flow_run().id,
        context.task_run.id if context else None,
        logger,
        rows=_known_checkpoints(spec),
    )
    try:
        return tasks.train(spec, _fan_out(logger, artifacts, EventPublisher(spec.run)))
    finally:
        artifacts.close()


@task(name="verify", **PATIENT)
def verify_checkpoint(spec: TrainSpec) -> VerifyReport:
    """Read every byte of the newest checkpoint and check it."""
    report = tasks.verify(spec.config.store, spec.run)
    size = readable_size(report.size)
    logger = get_run_logger()
    logger.info("%s verified: %s in %.1f s", report.checkpoint, size, report.seconds)
    if report.unmarked is not None:
        logger.warning("not marked as verified: %s", report.unmarked)
    return report


@task(name="promote", **PATIENT)
def promote_checkpoint(spec: TrainSpec, checkpoint: str, alias: str) -> Promotion:
    """Point an alias of the registered model at a verified checkpoint."""
    promotion = tasks.promote(spec.config, spec.run, checkpoint, alias)
    get_run_logger().info("%s", promotion)
    return promotion


@task(name="apply retention", **PATIENT)
def apply_retention(spec: TrainSpec) -> RetentionReport:
    """Mark what is no longer kept, and remove what was marked long enough ago."""
    report = tasks.retain(spec.config, spec.run)
    get_run_logger().info("%s", report)
    return report


@task(name="publish report", **PATIENT)
def publish_report(spec: TrainSpec) -> RunReport:
    """Publish what happened: attempts, what each resumed from, checkpoints."""
    report = tasks.report(spec.config.store, spec.run)
    create_markdown_artifact(
        markdown=report.markdown,
        key=artifact_key("report", spec.run),
        description=f"What happened in training run `{spec.run}`",
    )
    return report


def _known_checkpoints(spec: TrainSpec) -> list[Row]:
    try:
        report = tasks.report(spec.config.store, spec.run)
    except CheckpointNotFoundError:
        return []
    columns = ("checkpoint", "epoch", "step", "attempt", "trigger", "size", "state")
    rows = [{column: row[column] for column in columns} for row in report.checkpoints]
    return [{**row, "state": "committed"} if row["state"] == "valid" else row for row in rows]


def _fan_out(logger: _Logger, *sinks: EventSink) -> EventSink:
    """One sink for all. What goes wrong in showing an event is logged and stops no training."""

    def on_event(event: Event) -> None:
        line = tasks.narrate(event)
        if line is not None:
            logger.log(*line)
        for sink in sinks:
            try:
                sink(event)
            except Exception:
                logger.warning("could not show %s", type(event).__name__, exc_info=True)

    return on_event
