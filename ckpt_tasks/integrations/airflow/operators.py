"""The steps of a resumable training as Airflow operators. What they do is in `ckpt_tasks.tasks`.

Airflow owns the retries. What a retry cannot change fails at once, with one line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowSkipException

from ckpt_tasks.config import (
    AttemptConfig,
    CheckpointConfig,
    RetentionConfig,
    SaveConfig,
    ScheduleConfig,
)
from ckpt_tasks.errors import CheckpointNotFoundError, ConfigError
from ckpt_tasks.integrations.airflow.base import RunOperator, StepOperator
from ckpt_tasks.integrations.airflow.configuration import Settings
from ckpt_tasks.integrations.airflow.links import (
    DashboardLink,
    MlflowModelVersionLink,
    MlflowRunLink,
)
from ckpt_tasks.integrations.airflow.params import (
    check_conf,
    hyperparameters_of,
    refuse_templates,
)
from ckpt_tasks.sizes import readable_size

if TYPE_CHECKING:
    from ckpt_tasks.training.entrypoints.entrypoint import EntrypointSignature
    from ckpt_tasks.training.spec import TrainSpec

__all__ = [
    "PromoteOperator",
    "RecoverOperator",
    "ReportOperator",
    "ResolveOperator",
    "RunOperator",
    "StepOperator",
    "TrainOperator",
    "VerifyOperator",
]

_OWN_RUN_NAME = (
    "{{ dag.dag_id }}-{{ task.task_id }}-{{ run_id }}"
    "{% if ti.map_index >= 0 %}-{{ ti.map_index }}{% endif %}"
)


class _AttemptOperator(StepOperator):
    """Base of the steps that need to know what is trained.

    Parameters
    ----------
    entrypoint
        ``package.module:train`` or ``path/to/file.py:train`` of the training function. Files and
        modules beside the DAG file are found.
    params
        Its hyperparameters, as Airflow Params. Those of the DAG that have the name of a
        hyperparameter are taken too, and a trigger's configuration overrides both.
    hyperparameters
        The same as values: templates, or what earlier tasks return. They win over Params.
    schedule
        When checkpoints are saved. Default: the environment's (``CKPT_TASKS_SCHEDULE_...``), else
        each epoch; and at the end.
    save
        How a save is made.
    retention
        Which checkpoints are kept, from each commit on. Default: the environment's
        (``CKPT_TASKS_RETENTION_...``), else all.
    attempt
        How attempts follow one another and end.
    nproc
        Ranks that train, each in a process of its own, with torchrun's environment, where the task
        runs. Default: that of `attempt`, else the environment's (``CKPT_TASKS_ATTEMPT_NPROC``).
    python
        Interpreter of the training process, in an environment without Airflow, say.
    resume
        ``auto`` (the newest checkpoint), ``fresh`` (the beginning) or a checkpoint's id: where
        the first try starts. Retries always go on from the newest.
    """

    template_fields: Sequence[str] = (
        *RunOperator.template_fields,
        "entrypoint",
        "hyperparameters",
        "python",
        "resume",
    )

    _recorded_as: str | None = None

    def __init__(
        self,
        *,
        entrypoint: str,
        run_name: str = _OWN_RUN_NAME,
        hyperparameters: Mapping[str, Any] | None = None,
        schedule: ScheduleConfig | None = None,
        save: SaveConfig | None = None,
        retention: RetentionConfig | None = None,
        attempt: AttemptConfig | None = None,
        nproc: int | None = None,
        python: str | None = None,
        resume: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(run_name=run_name, **kwargs)
        refuse_templates(self.params)
        self.entrypoint = entrypoint
        self.hyperparameters = hyperparameters
        self.schedule = schedule
        self.save = save
        self.retention = retention
        self.attempt = attempt
        self.nproc = nproc
        self.python = python
        self.resume = resume
        self._settings()  # a mistake in them is one of the parse

    def _settings(self) -> Settings:
        return dataclasses.replace(
            super()._settings(),
            schedule=self.schedule,
            save=self.save,
            retention=self.retention,
            attempt=self.attempt,
            nproc=self.nproc,
        )

    def _spec(
        self, context: Context, config: CheckpointConfig, *, task_id: str | None = None
    ) -> TrainSpec:
        from ckpt_tasks import tasks
        from ckpt_tasks.integrations.airflow.dag_folder import code_folders
        from ckpt_tasks.integrations.airflow.task_instance import invocation_of, tags_of

        folders = code_folders(context["dag"], context)
        signature = tasks.signature_of_entrypoint(self.entrypoint, self.python, folders)
        return tasks.resolve(
            self.entrypoint,
            run=self.run_name,
            params=self._hyperparameters(signature, context),
            config=config,
            invocation=invocation_of(context, task_id or self.task_id),
            resume=self.resume,
            tags=tags_of(context),
            python=self.python,
            recorded_as=self._recorded_as,
            folders=folders,
        )

    def _hyperparameters(self, signature: EntrypointSignature, context: Context) -> dict[str, Any]:
        chosen = hyperparameters_of(signature, self, context["params"])
        return {**chosen, **(self.hyperparameters or {})}


class ResolveOperator(_AttemptOperator):
    """Check the function, its hyperparameters and the store before anything is started."""

    def _execute(self, context: Context, config: CheckpointConfig) -> dict[str, Any]:
        from ckpt_tasks.masking import mask_hyperparameters, mask_url

        check_conf(context)
        spec = self._spec(context, config)
        store = mask_url(config.store.url)
        self.log.info("training run %r in store %s", spec.run, store)
        return {"run": spec.run, "store": store, "params": mask_hyperparameters(spec.params)}


class RecoverOperator(_AttemptOperator):
    """Report what training would start from, verified. The train step picks again by itself.

    Parameters
    ----------
    train_task_id
        The task that will train, beside this one: where `resume` binds its first try only,
        whether that has been.
    """

    def __init__(self, *, train_task_id: str = "train", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.train_task_id = train_task_id

    def _execute(self, context: Context, config: CheckpointConfig) -> dict[str, Any]:
        import msgspec

        from ckpt_tasks import tasks

        train_task_id = self.train_task_id
        if self.task_group is not None:
            train_task_id = self.task_group.child_id(train_task_id)  # type: ignore[no-untyped-call]
        found = tasks.recover(self._spec(context, config, task_id=train_task_id))
        if found.restorable:
            self.log.info("%s: %s", found, found.why)
        else:
            self.log.warning("%s", found)
        for passed in found.passed_over:
            self.log.warning("passed over: %s", passed)
        report: dict[str, Any] = msgspec.to_builtins(found)
        return report


class TrainOperator(_AttemptOperator):
    """Train in supervised processes; a retry, and a clear, resume from the newest checkpoint.

    Each try is an attempt: it claims the run's next number and then picks its checkpoint. When
    the task is stopped (marked as failed or cleared in the UI, or its worker is shut down), the
    trainer saves at its next boundary and stops. Airflow gives a task 5 seconds for that. Then
    it kills the task's process, but not the trainer, which goes on saving for `attempt.grace`
    (30 s by default). Under KubernetesExecutor the pod goes away with the task, so there a task
    that is marked or cleared has those 5 seconds; one whose pod is deleted or whose node is drained
    has ``terminationGracePeriodSeconds``, which should be longer than `attempt.grace`.

    `outlets`, if there are any, are told of the run's newest checkpoint by the event's extra:
    ``run``, ``uri``, ``digest``, ``epoch``, ``step``, ``mlflow_run_id``, ``version``, ... While
    it runs, the task's state store (Airflow 3.3) has the same of the newest checkpoint, under
    the key ``ckpt_tasks``.
    """

    operator_extra_links = (MlflowRunLink(), MlflowModelVersionLink(), DashboardLink())
    _stopping = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.page_links: dict[str, str] = {}

    def _execute(self, context: Context, config: CheckpointConfig) -> dict[str, Any]:
        import msgspec

        from ckpt_tasks import tasks
        from ckpt_tasks.integrations.airflow.assets import ask_registry, tell_outlets
        from ckpt_tasks.integrations.airflow.relay import Relay

        spec = self._spec(context, config)
        relay = Relay(self, context, spec, self.page_links)
        outcome = tasks.train(spec, relay, stop_requested=lambda: self._stopping)
        if outcome.checkpoint is not None:
            if "version" not in relay.registered:
                # Registered by an earlier try: this one had nothing to train any more.
                relay.show_found(ask_registry(self, config, spec.run, outcome.checkpoint))
            registered = relay.registered
            tell_outlets(self, context, config, spec.run, outcome.checkpoint, registered)
        result: dict[str, Any] = msgspec.to_builtins(outcome)
        return result

    def on_kill(self) -> None:
        """Have the trainer save and stop; called in a signal's handler, so it only says so."""
        self._stopping = True


class VerifyOperator(StepOperator):
    """Read every byte of the run's newest checkpoint and check it."""

    def _execute(self, context: Context, config: CheckpointConfig) -> dict[str, Any]:
        import msgspec

        from ckpt_tasks import tasks
        from ckpt_tasks.integrations.airflow.assets import tell_outlets

        report = tasks.verify(config.store, self.run_name)
        size = readable_size(report.size)
        self.log.info("%s verified: %s in %.1f s", report.checkpoint, size, report.seconds)
        if report.unmarked is not None:
            self.log.warning("not marked as verified: %s", report.unmarked)
        tell_outlets(self, context, config, self.run_name, report.checkpoint)
        result: dict[str, Any] = msgspec.to_builtins(report)
        return result


class PromoteOperator(StepOperator):
    """Point an alias of the registered model at a checkpoint.

    Parameters
    ----------
    checkpoint
        Its id, from `VerifyOperator`'s XCom, say. Default: the newest.
    alias
        Name of the alias.
    """

    template_fields: Sequence[str] = (*RunOperator.template_fields, "checkpoint", "alias")

    def __init__(
        self, *, checkpoint: str | None = None, alias: str = "verified", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.checkpoint = checkpoint
        self.alias = alias

    def _execute(self, context: Context, config: CheckpointConfig) -> dict[str, Any]:
        import msgspec

        from ckpt_tasks import tasks
        from ckpt_tasks.integrations.airflow.assets import names_of, tell_outlets

        if config.registry.tracking_uri is None:
            raise ConfigError(
                "nothing to promote in: give mlflow_conn_id, or a registry with a tracking_uri"
            )
        checkpoint = self.checkpoint or tasks.locate(config.store, self.run_name).checkpoint
        promotion = tasks.promote(config, self.run_name, checkpoint, self.alias)
        self.log.info("%s", promotion)
        registered = names_of(promotion.registration)
        tell_outlets(self, context, config, self.run_name, checkpoint, registered)
        result: dict[str, Any] = msgspec.to_builtins(promotion)
        return result


class ReportOperator(StepOperator):
    """Say what happened: attempts, what each resumed from, checkpoints."""

    def _execute(self, context: Context, config: CheckpointConfig) -> dict[str, Any]:
        import msgspec

        from ckpt_tasks import tasks

        try:
            report = tasks.report(config.store, self.run_name)
        except CheckpointNotFoundError as error:
            # A failure here would draw the eye from the one that kept the run from beginning.
            raise AirflowSkipException(f"nothing to report: {error}") from None
        for line in report.markdown.splitlines():
            self.log.info("%s", line)
        result: dict[str, Any] = msgspec.to_builtins(report)
        return result
