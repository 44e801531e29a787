"""Airflow Params: the training function's own hyperparameters as a trigger form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec
from airflow.sdk import BaseOperator, Context, Param
from airflow.sdk.definitions.param import ParamsDict

from ckpt_tasks.errors import ConfigError
from ckpt_tasks.suggest import did_you_mean
from ckpt_tasks.tasks.form import (
    RESUME,
    RESUME_HELP,
    RESUME_PATTERN,
    form_help,
    given_parameters,
)
from ckpt_tasks.training.entrypoints.entrypoint import EntrypointSignature, Hyperparameter

__all__ = ["check_conf", "form_params", "hyperparameters_of", "refuse_templates"]

_NULL = {"type": "null"}


def form_params(signature: EntrypointSignature) -> dict[str, Param]:
    """A Param for each hyperparameter, in order, then `resume`.

    The schema is `JSON Schema <https://json-schema.org>`__ as Airflow's form understands it: one
    ``type``, which may be a list, or an ``enum``.

    Raises
    ------
    ConfigError
        A hyperparameter has the name that the form needs for itself.
    """
    if any(h.name == RESUME for h in signature.hyperparameters):
        raise ConfigError(
            f"{signature.entrypoint}: a DAG cannot have a hyperparameter named {RESUME!r}, which "
            "says where a run starts; rename it"
        )
    params = {h.name: _param(h) for h in signature.hyperparameters}
    params[RESUME] = Param(
        "auto", type="string", pattern=RESUME_PATTERN, title=RESUME, description=RESUME_HELP
    )
    return params


def hyperparameters_of(
    signature: EntrypointSignature, operator: BaseOperator, values: Mapping[str, Any]
) -> dict[str, Any]:
    """The hyperparameters among a task's params.

    Params of the DAG serve other tasks too, so those of other names are left out. The
    operator's own are all meant for the function, so a wrong name among them is passed on, to
    be refused.

    Parameters
    ----------
    values
        ``context["params"]``: checked against their schemas, the trigger's configuration in
        them.
    """
    names = {h.name for h in signature.hyperparameters}
    own = operator.params
    if isinstance(own, ParamsDict):
        names.update(name for name in own if own.get_param(name).source != "dag")
    chosen = {name: value for name, value in values.items() if name in names}
    return given_parameters(signature.hyperparameters, chosen)


def check_conf(context: Context) -> None:
    """Raise `ConfigError` for a name in the DAG run's conf that is no Param of the DAG.

    Airflow passes it over, and a misspelt hyperparameter would be trained with its default.
    """
    dag = context["dag"]
    for name in context["dag_run"].conf or {}:
        if name not in dag.params:
            hint = did_you_mean(name, dag.params, what="Params")
            raise ConfigError(f"DAG {dag.dag_id!r} has no Param {name!r}; {hint}")


def refuse_templates(params: ParamsDict | Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a template among Params, which Airflow renders nowhere."""
    for name, param in params.items():
        value = param.value if isinstance(param, Param) else param
        if isinstance(value, str) and "{{" in value:
            raise ConfigError(
                f"params={{{name!r}: {value!r}}}: Params are no templates; say "
                f"hyperparameters={{{name!r}: ...}}"
            )


def _param(hyperparameter: Hyperparameter) -> Param:
    schema = _schema(hyperparameter.annotation)
    about: dict[str, Any] = {"title": hyperparameter.name, "description": form_help(hyperparameter)}
    if hyperparameter.required:
        return Param(**about, **schema)
    if not hyperparameter.default_known:
        schema = _or_null(schema)
    # A tuple is a list in JSON, and an array's schema refuses it.
    return Param(json.loads(json.dumps(hyperparameter.default)), **about, **schema)


def _schema(annotation: Any) -> dict[str, Any]:
    """One ``type`` wherever that is possible: the form chooses its widget by it."""
    schema = msgspec.json.schema(annotation)
    options = schema.get("anyOf", [schema])
    others = [_typed(option) for option in options if option != _NULL]
    if not others:
        return dict(_NULL)
    if len(others) == 1:
        merged = others[0]
    elif all(set(option) == {"type"} for option in others):
        merged = {"type": [option["type"] for option in others]}
    else:
        merged = {"anyOf": others}
    return _or_null(merged) if _NULL in options else merged


def _typed(option: dict[str, Any]) -> dict[str, Any]:
    """An enum says its type, without which the form has no list to choose from."""
    if "enum" not in option:
        return option
    names = {int: "integer", str: "string", type(None): "null"}
    # The values in an order of their own, None at the end.
    values = sorted(option["enum"], key=lambda value: value is None)
    types = list(dict.fromkeys(names[type(value)] for value in values))
    return {"type": types if len(types) > 1 else types[0], "enum": values}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    if "anyOf" in schema:
        return {"anyOf": [*schema["anyOf"], _NULL]}
    if "type" not in schema:
        return schema
    types = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    nullable = {**schema, "type": list(dict.fromkeys([*types, "null"]))}
    if "enum" in schema:
        nullable["enum"] = list(dict.fromkeys([*schema["enum"], None]))
    return nullable
