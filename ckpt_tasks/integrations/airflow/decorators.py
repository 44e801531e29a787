"""``@task.resumable_training``: a training function written in the DAG file itself."""

from __future__ import annotations

import functools
import inspect
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import Context
from airflow.sdk.bases.decorator import DecoratedOperator, TaskDecorator, task_decorator_factory

from ckpt_tasks.config import CheckpointConfig
from ckpt_tasks.errors import ConfigError
from ckpt_tasks.integrations.airflow.operators import TrainOperator

if TYPE_CHECKING:
    from ckpt_tasks.training.entrypoints.entrypoint import EntrypointSignature

__all__ = ["resumable_training_task"]

_SET_WHEN_EXECUTED = "<the decorated function>"


class _ResumableTrainingOperator(DecoratedOperator, TrainOperator):
    """Trains a function of the DAG file, from its source alone."""

    custom_operator_name = "@task.resumable_training"
    template_fields: Sequence[str] = (
        *DecoratedOperator.template_fields,
        *(field for field in TrainOperator.template_fields if field != "entrypoint"),
    )

    def __init__(self, *, python_callable: Callable[..., Any], **kwargs: Any) -> None:
        super().__init__(
            python_callable=_without_run(python_callable),
            entrypoint=_SET_WHEN_EXECUTED,
            **kwargs,
        )

    def _execute(self, context: Context, config: CheckpointConfig) -> dict[str, Any]:
        name = self.python_callable.__name__
        with tempfile.TemporaryDirectory(prefix="ckpt-tasks-") as folder:
            file = Path(folder) / f"{name}.py"
            source: str = self.get_python_source()  # type: ignore[no-untyped-call]
            # Annotations may name what only the DAG file imports.
            file.write_text(f"from __future__ import annotations\n\n{source}", "utf-8")
            self.entrypoint = f"{file}:{name}"
            self._recorded_as = f"{context['dag'].dag_id}.{self.task_id}:{name}"
            return super()._execute(context, config)

    def _hyperparameters(self, signature: EntrypointSignature, context: Context) -> dict[str, Any]:
        called = inspect.signature(self.python_callable)
        bound = called.bind(*self.op_args, **self.op_kwargs)
        bound.apply_defaults()
        hyperparameters: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            if called.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                hyperparameters.update(value)
            else:
                hyperparameters[name] = value
        return hyperparameters


def resumable_training_task(
    python_callable: Callable[..., Any] | None = None, **kwargs: Any
) -> TaskDecorator:
    """Make a training function a task; use it as ``@task.resumable_training(...)``.

    The function is called ``train(run, ...)`` in the trainer's process, from its source alone:
    what it needs it imports itself. The task is called with the hyperparameters.

    Parameters
    ----------
    python_callable
        The function; its first parameter is the run.
    **kwargs
        As `TrainOperator` takes them, but ``entrypoint`` and ``params``.
    """
    return task_decorator_factory(
        python_callable=python_callable,
        decorated_operator_class=_ResumableTrainingOperator,
        **kwargs,
    )


def _without_run(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as the DAG's author calls it: the run is given by the trainer."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    if not parameters:
        raise ConfigError(
            f"{function.__name__} takes no parameter; its first one is the run: "
            f"def {function.__name__}(run, ...)"
        )

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        raise ConfigError(f"{function.__name__} is called in the trainer's process only")

    call.__signature__ = signature.replace(parameters=parameters[1:])  # type: ignore[attr-defined]
    return call
