from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prefect.utilities.callables import parameter_schema

from ckpt_tasks.config import StoreConfig
from ckpt_tasks.errors import ConfigError
from ckpt_tasks.integrations.prefect import CheckpointStore, ModelRegistry, resumable_flow

TRAINING = '''
from typing import Literal

from somewhere import DEFAULT_DEPTH

def train(
    run,
    lr: float = 1e-3,
    epochs: int = 20,
    *,
    loss: Literal["mse", "l1"] = "mse",
    width: list[int] | None = None,
    depth: int = DEFAULT_DEPTH,
    data: str,
) -> None:
    """Fit the net.

    Parameters
    ----------
    lr
        Learning rate of AdamW,
        before warm-up.
    epochs
        Passes over the data.
    """

def clashing(run, resume: str = "x"): ...
'''


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "training.py"
    path.write_text(TRAINING, encoding="utf-8")
    return path


@pytest.fixture
def form(module: Path) -> dict[str, Any]:
    return parameter_schema(resumable_flow(f"{module}:train", name="fit")).model_dump()


def test_form_shows_each_hyperparameter_in_order(form: dict[str, Any]) -> None:
    """The fields are the function's hyperparameters in their order, then ``resume``."""
    fields = sorted(form["properties"].items(), key=lambda item: item[1]["position"])

    assert [name for name, _ in fields] == [
        *("lr", "epochs", "loss", "width", "depth", "data", "resume")
    ]
    assert form["required"] == ["data"]


def test_form_has_types_defaults_and_descriptions(form: dict[str, Any]) -> None:
    """Types are what a form needs to show the right widget; help comes from the docstring."""
    lr, loss = form["properties"]["lr"], form["properties"]["loss"]

    assert (lr["type"], lr["default"]) == ("number", 1e-3)
    assert lr["description"] == "Learning rate of AdamW, before warm-up."
    assert (form["properties"]["epochs"]["type"], loss["enum"]) == ("integer", ["mse", "l1"])
    assert {"type": "null"} in form["properties"]["width"]["anyOf"]


def test_form_leaves_open_a_default_that_only_the_code_knows(form: dict[str, Any]) -> None:
    """A computed default is optional in the form, which says what leaving it empty means."""
    depth = form["properties"]["depth"]

    assert depth["default"] is None
    assert "own default" in depth["description"]


def test_form_accepts_only_sensible_resume_values(form: dict[str, Any]) -> None:
    """``resume`` has its default and a pattern, so a wrong one is refused when triggering."""
    resume = form["properties"]["resume"]

    assert resume["default"] == "auto"
    assert resume["pattern"].startswith("^(auto|fresh|step-")
    assert "newest" in resume["description"]


def test_flow_checks_parameters_by_type(module: Path) -> None:
    """Values from a trigger are validated and converted as the hyperparameters' types say."""
    flow = resumable_flow(f"{module}:train", name="fit")

    checked = flow.validate_parameters({"data": "a", "epochs": "3", "resume": "fresh"})

    assert (checked["epochs"], checked["resume"]) == (3, "fresh")


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"data": "a", "resume": "newest"}, "resume"),
        ({"data": "a", "lr": "fast"}, "lr"),
        ({}, "data"),
    ],
)
def test_flow_refuses_wrong_parameters(
    module: Path, parameters: dict[str, Any], named: str
) -> None:
    """A wrong value never reaches the training; the message names the field."""
    from prefect.exceptions import ParameterTypeError

    flow = resumable_flow(f"{module}:train", name="fit")

    with pytest.raises(ParameterTypeError, match=named):
        flow.validate_parameters(parameters)


def test_flow_is_found_again_by_module_and_name(module: Path) -> None:
    """``serve`` looks for the flow in the module that made it, under the flow's name."""
    flow = resumable_flow(f"{module}:train", name="fit-digits")

    assert flow.fn.__module__ == __name__
    assert flow.fn.__qualname__ == "fit_digits"
    assert flow.description.startswith("Fit the net.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"entrypoint": "{module}:clashing"}, "resume"),
        ({"entrypoint": "{module}:absent"}, "absent"),
        ({"entrypoint": "{module}:train", "run_name": "{flow_id}"}, "flow_id"),
        ({"entrypoint": "{module}:train", "run_name": "{"}, "no template"),
    ],
)
def test_author_mistakes_raise_when_the_flow_is_made(
    module: Path, arguments: dict[str, str], message: str
) -> None:
    """What can be checked while the flow is defined is not left to its first run."""
    filled = {**arguments, "entrypoint": arguments["entrypoint"].format(module=module)}

    with pytest.raises(ConfigError, match=message):
        resumable_flow(**filled)  # type: ignore[arg-type]


def test_credentials_of_blocks_are_not_in_parameters_or_configuration() -> None:
    """A block gives its configuration without its credentials, and hides them when printed."""
    store = CheckpointStore(url="s3://b/p", credentials={"AWS_SECRET_ACCESS_KEY": "hush"})
    registry = ModelRegistry(tracking_uri="http://m", credentials={"MLFLOW_TRACKING_TOKEN": "hush"})

    assert store.config() == StoreConfig(url="s3://b/p")
    assert registry.config().tracking_uri == "http://m"
    assert "hush" not in f"{store} {store!r} {registry!r} {store.config()} {registry.config()}"
