"""The trigger form: schemas of hyperparameters as Airflow validates a run's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support import dag_home  # noqa: F401 - before Airflow is imported

# isort: split
import pytest
from airflow.sdk import DAG, Param
from airflow.sdk.definitions.param import process_params
from airflow.sdk.exceptions import ParamValidationError
from airflow.serialization.serialized_objects import DagSerialization

from ckpt_tasks.errors import ConfigError
from ckpt_tasks.integrations.airflow import TrainOperator, resumable_dag
from ckpt_tasks.integrations.airflow.params import form_params, hyperparameters_of
from ckpt_tasks.training.entrypoints.entrypoint import check_params, read_signature

TRAINING = '''
from typing import Any, Literal, Optional, Union

from somewhere import DEFAULT_DEPTH

def train(
    run,
    lr: float = 1e-3,
    epochs: int = 20,
    amp: bool = False,
    name: str = "net",
    loss: Literal["mse", "l1"] = "mse",
    bits: Literal[8, 16] = 8,
    norm: Literal["batch", None] = "batch",
    clip: Optional[float] = None,
    scale: "int | None" = 3,
    head: Optional[Literal["linear", "conv"]] = None,
    widths: list[int] = [32, 64],
    layers: list[int] | None = None,
    freeze: Union[int, str] = 0,
    sizes: Union[int, list[int]] = 8,
    extra: dict[str, float] = {},
    betas: tuple[float, float] = (0.9, 0.999),
    milestones: tuple[int, ...] = (),
    anything: Any = None,
    untyped=None,
    depth: int = DEFAULT_DEPTH,
    mode: Literal["a", "b"] = DEFAULT_DEPTH,
    shape: list[int] = DEFAULT_DEPTH,
    guess: Any = DEFAULT_DEPTH,
    names=frozenset,
    chosen={1, 2},
    bound: float = 1e999,
    *,
    data: str,
    split: Literal["even", "odd"],
) -> None:
    """Fit the net.

    Parameters
    ----------
    lr
        Learning rate of AdamW,
        before warm-up.
    depth
        Number of blocks.
    """

def simple(run, lr: float = 1e-3, data: str = "mnist"): ...

def clashing(run, resume: str = "x"): ...
'''

SCHEMAS = {
    "lr": {"type": "number"},
    "epochs": {"type": "integer"},
    "amp": {"type": "boolean"},
    "name": {"type": "string"},
    "loss": {"type": "string", "enum": ["l1", "mse"]},
    "bits": {"type": "integer", "enum": [8, 16]},
    "norm": {"type": ["string", "null"], "enum": ["batch", None]},
    "clip": {"type": ["number", "null"]},
    "scale": {"type": ["integer", "null"]},
    "head": {"type": ["string", "null"], "enum": ["conv", "linear", None]},
    "widths": {"type": "array", "items": {"type": "integer"}},
    "layers": {"type": ["array", "null"], "items": {"type": "integer"}},
    "freeze": {"type": ["integer", "string"]},
    "sizes": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]},
    "extra": {"type": "object", "additionalProperties": {"type": "number"}},
    "betas": {
        "type": "array",
        "prefixItems": [{"type": "number"}, {"type": "number"}],
        "minItems": 2,
        "maxItems": 2,
        "items": False,
    },
    "milestones": {"type": "array", "items": {"type": "integer"}},
    "anything": {},
    "untyped": {},
    "depth": {"type": ["integer", "null"]},
    "mode": {"type": ["string", "null"], "enum": ["a", "b", None]},
    "shape": {"type": ["array", "null"], "items": {"type": "integer"}},
    "guess": {},
    "names": {},
    "chosen": {},
    "bound": {"type": ["number", "null"]},
    "data": {"type": "string"},
    "split": {"type": "string", "enum": ["even", "odd"]},
}
REQUIRED = {"data": "x", "split": "odd"}


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "training.py"
    path.write_text(TRAINING, encoding="utf-8")
    return path


@pytest.fixture
def params(module: Path) -> dict[str, Param]:
    return form_params(read_signature(f"{module}:train"))


@pytest.fixture
def dag(module: Path) -> DAG:
    return resumable_dag(f"{module}:train", dag_id="fit", store="memory://params")


def _hyperparameters(dag: DAG, conf: dict[str, Any]) -> dict[str, Any]:
    """What the train task takes from a run's configuration, validated as its process does it."""
    task = dag.get_task("train")
    assert isinstance(task, TrainOperator)
    values = process_params(dag, task, conf, suppress_exception=False)
    signature = read_signature(task.entrypoint)
    return check_params(signature, hyperparameters_of(signature, task, values))


def test_every_annotation_has_its_schema(params: dict[str, Param]) -> None:
    """One type that chooses the form's widget, and what the validation needs besides."""
    shown = {name: dict(param.schema) for name, param in params.items() if name != "resume"}
    for schema in shown.values():
        schema.pop("title")

    assert shown == SCHEMAS


def test_fields_are_in_order_with_defaults_and_help(params: dict[str, Param]) -> None:
    """Hyperparameters as the function has them, then ``resume``; help from the docstring."""
    assert list(params) == [*SCHEMAS, "resume"]
    assert params["lr"].value == 1e-3
    assert params["lr"].description == "Learning rate of AdamW, before warm-up."
    assert params["betas"].value == [0.9, 0.999]
    assert params["depth"].value is None
    assert params["depth"].description == (
        "Number of blocks. (Left empty: the function's own default.)"
    )
    assert params["resume"].value == "auto"


def test_defaults_pass_their_own_schema(dag: DAG) -> None:
    """A run triggered with no more than what is required takes every default as it is."""
    taken = _hyperparameters(dag, REQUIRED)

    unknown = {"depth", "mode", "shape", "guess", "names", "chosen", "bound"}
    assert set(taken) == set(SCHEMAS) - unknown
    assert (taken["lr"], taken["widths"], taken["betas"]) == (1e-3, [32, 64], (0.9, 0.999))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 1),
        ("clip", None),
        ("clip", 0.5),
        ("head", None),
        ("head", "conv"),
        ("norm", None),
        ("layers", [1, 2]),
        ("layers", None),
        ("freeze", "all"),
        ("sizes", [1]),
        ("betas", [0.8, 0.9]),
        ("extra", {"a": 0.5}),
        ("anything", {"nested": [1, None]}),
        ("untyped", "text"),
        ("depth", 4),
        ("mode", "b"),
        ("guess", [1]),
        ("resume", "fresh"),
        ("resume", "step-00000012-a1-s2"),
    ],
)
def test_right_values_of_a_trigger_arrive(dag: DAG, name: str, value: Any) -> None:
    """Validated by Airflow and by the function's annotations, and what was given is passed."""
    taken = _hyperparameters(dag, {**REQUIRED, name: value})

    if name != "resume":
        assert taken[name] == (tuple(value) if name == "betas" else value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", "fast"),
        ("lr", None),
        ("epochs", 1.5),
        ("amp", "yes"),
        ("loss", "huber"),
        ("bits", 4),
        ("head", "none"),
        ("widths", [1.5]),
        ("layers", "deep"),
        ("betas", [0.9]),
        ("betas", [0.9, 0.99, 0.999]),
        ("extra", {"a": "b"}),
        ("depth", "deep"),
        ("mode", "c"),
        ("data", 3),
        ("resume", "newest"),
        ("resume", "auto; rm -rf"),
    ],
)
def test_wrong_values_of_a_trigger_are_refused(dag: DAG, name: str, value: Any) -> None:
    """By the schema, before a task is started; the message names the field."""
    with pytest.raises(ParamValidationError, match=f"param {name}"):
        _hyperparameters(dag, {**REQUIRED, name: value})


def test_required_hyperparameter_without_a_value_is_refused(dag: DAG) -> None:
    """The form marks it as required; a trigger that leaves it out fails with its name."""
    with pytest.raises(ParamValidationError, match="param split"):
        _hyperparameters(dag, {"data": "x"})


def test_params_survive_the_database(dag: DAG) -> None:
    """The API server sees DAGs serialised only: it validates as the task would."""
    stored = DagSerialization.deserialize_dag(DagSerialization.serialize_dag(dag))

    stored.params.deep_merge(REQUIRED).validate()
    with pytest.raises(ParamValidationError, match="lr"):
        stored.params.deep_merge({**REQUIRED, "lr": "fast"}).validate()


def test_params_of_other_tasks_are_left_alone(module: Path) -> None:
    """Params of the DAG serve several tasks: only the function's own are taken."""
    with DAG("mixed", params={"lr": 0.5, "environment": "prod"}) as dag:
        task = TrainOperator(task_id="train", entrypoint=f"{module}:simple", store="memory://x")
    values = process_params(dag, task, {}, suppress_exception=False)

    assert hyperparameters_of(read_signature(task.entrypoint), task, values) == {"lr": 0.5}


def test_wrong_name_among_the_tasks_own_params_is_told(module: Path) -> None:
    """A typing error must not train for hours with a default."""
    with DAG("typo") as dag:
        task = TrainOperator(
            task_id="train", entrypoint=f"{module}:simple", params={"learnig_rate": 0.5}
        )
    values = process_params(dag, task, {}, suppress_exception=False)
    signature = read_signature(task.entrypoint)

    with pytest.raises(ConfigError, match="learnig_rate"):
        check_params(signature, hyperparameters_of(signature, task, values))


def test_hyperparameter_with_the_forms_own_name_is_refused(module: Path) -> None:
    """``resume`` says where a run starts; the author learns of the clash at the parse."""
    with pytest.raises(ConfigError, match=r"named 'resume'.*rename"):
        resumable_dag(f"{module}:clashing")


def test_scheduled_dag_needs_every_default(module: Path) -> None:
    """A DAG that starts by itself cannot ask anybody: Airflow says so at the parse."""
    with pytest.raises(ValueError, match="without default"):
        resumable_dag(f"{module}:train", dag_schedule="@daily").validate()
