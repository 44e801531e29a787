from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.made_runs import MadeRun

from ckpt_tasks import tasks
from ckpt_tasks.config import CheckpointConfig, RegistryConfig, StoreConfig
from ckpt_tasks.errors import (
    CheckpointNotFoundError,
    CkptTasksError,
    ConfigError,
    CorruptCheckpointError,
)
from ckpt_tasks.registry import load_registry
from ckpt_tasks.store import Store, open_store
from ckpt_tasks.training.spec import TrainSpec

RUN = "digits/1"
TRAINING = """
from ckpt_tasks import TrainingRun

raise AssertionError("the orchestrator must not import the training code")

def train(run: TrainingRun, lr: float = 0.1, epochs: int = 2) -> None:
    pass
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def config(tmp_path: Path) -> CheckpointConfig:
    return CheckpointConfig(store=StoreConfig(url=str(tmp_path / "store")))


@pytest.fixture
def entrypoint(tmp_path: Path) -> str:
    path = tmp_path / "toy.py"
    path.write_text(TRAINING, encoding="utf-8")
    return f"{path}:train"


def _spec(config: CheckpointConfig, **changes: Any) -> TrainSpec:
    fields = {"entrypoint": "toy:train", "run": RUN, "config": config, "invocation": "i1"}
    return TrainSpec(**{**fields, **changes})


def test_resolve_makes_a_spec_without_importing_the_module(
    entrypoint: str, config: CheckpointConfig
) -> None:
    """Hyperparameters are read by the annotations, and everything asked for is in the spec."""
    spec = tasks.resolve(
        entrypoint, run=RUN, params={"lr": "3e-4"}, config=config, invocation="i1", resume="fresh"
    )

    assert spec == _spec(config, entrypoint=entrypoint, params={"lr": 3e-4}, resume="fresh")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"params": {"learning_rate": 1.0}}, "learning_rate"),
        ({"params": {"lr": "much"}}, "lr"),
        ({"resume": "newest"}, "newest"),
        ({"run": ""}, "run name"),
        ({"python": "/nowhere/python"}, "/nowhere/python"),
    ],
)
def test_resolve_refuses_what_cannot_work(
    entrypoint: str, config: CheckpointConfig, changes: dict[str, Any], message: str
) -> None:
    """Each wrong argument is one early ConfigError that names it."""
    asked: dict[str, Any] = {"run": RUN, "params": {}, "config": config, "invocation": "i1"}

    with pytest.raises(ConfigError, match=message):
        tasks.resolve(entrypoint, **{**asked, **changes})


def test_resolve_refuses_an_entrypoint_that_is_not_there(config: CheckpointConfig) -> None:
    """A module that does not exist is found out before anything starts."""
    with pytest.raises(ConfigError, match="no_such_module"):
        tasks.resolve("no_such_module:train", run=RUN, params={}, config=config, invocation="i")


def test_resolve_refuses_a_store_on_a_file(entrypoint: str, tmp_path: Path) -> None:
    """A store whose folder is a file is found out before anything starts."""
    (tmp_path / "file").write_text("", encoding="ascii")
    config = CheckpointConfig(store=StoreConfig(url=str(tmp_path / "file/store")))

    with pytest.raises(CkptTasksError, match="file"):
        tasks.resolve(entrypoint, run=RUN, params={}, config=config, invocation="i1")


def test_recover_reports_the_beginning_for_a_new_run(config: CheckpointConfig) -> None:
    """A run that nobody began would start from the beginning."""
    found = tasks.recover(_spec(config))

    assert (found.checkpoint, found.step, found.attempts) == (None, 0, 0)
    assert found.restorable


def test_recover_of_a_checkpoint_needs_its_run(config: CheckpointConfig) -> None:
    """Of a run that nobody began only the beginning can be had."""
    found = tasks.recover(_spec(config, resume="step-00000008-a1-s1"))
    assert not found.restorable
    assert "there is no such run yet" in str(found)


def test_recover_reports_what_a_retry_would_start_from(
    store: Store, config: CheckpointConfig
) -> None:
    """The newest checkpoint that verifies is named; a damaged newer one is given a reason."""
    run = MadeRun(store, RUN)
    attempt = run.begin()
    older, newer = attempt.commit(8), attempt.commit(16)
    run.damage_tensors(newer)
    before = store.list_objects("")

    found = tasks.recover(_spec(config))

    assert (found.checkpoint, found.step) == (older, 8)
    assert newer in found.passed_over[0]
    assert store.list_objects("") == before


def test_recover_says_when_nothing_can_be_restored(store: Store, config: CheckpointConfig) -> None:
    """All checkpoints damaged: reported as not restorable, without failing the report."""
    run = MadeRun(store, RUN)
    run.damage_tensors(run.begin().commit(8))

    found = tasks.recover(_spec(config))

    assert not found.restorable
    assert "cannot be resumed" in str(found)


def test_recover_says_when_the_run_is_complete(store: Store, config: CheckpointConfig) -> None:
    """A complete run has nothing to start."""
    run = MadeRun(store, RUN)
    run.complete(run.begin().commit(8))

    assert tasks.recover(_spec(config)).complete


def test_verify_reads_the_newest_checkpoint(store: Store, config: CheckpointConfig) -> None:
    """The newest valid checkpoint is read whole and found right."""
    run = MadeRun(store, RUN)
    attempt = run.begin()
    attempt.commit(8)
    newest = attempt.commit(16)

    report = tasks.verify(config.store, RUN)

    assert report.checkpoint == newest
    assert report.ok


def test_verify_raises_for_damage(store: Store, config: CheckpointConfig) -> None:
    """One flipped bit makes the step fail, naming the checkpoint."""
    run = MadeRun(store, RUN)
    attempt = run.begin()
    newest = attempt.commit(8)
    run.damage_tensors(newest)

    with pytest.raises(CorruptCheckpointError, match=newest):
        tasks.verify(config.store, RUN)


def test_verify_raises_without_a_checkpoint(store: Store, config: CheckpointConfig) -> None:
    """A run that has committed nothing cannot be verified."""
    MadeRun(store, RUN).begin()

    with pytest.raises(CheckpointNotFoundError, match="no valid checkpoint"):
        tasks.verify(config.store, RUN)


def test_report_tells_what_each_attempt_resumed_from(
    store: Store, config: CheckpointConfig
) -> None:
    """Rows and Markdown name every attempt, its start, and every checkpoint."""
    run = MadeRun(store, RUN)
    first = run.begin().commit(8)
    second = run.begin().commit(16, epoch=1)

    report = tasks.report(config.store, RUN)

    assert [row["resumed from"] for row in report.attempts] == ["the beginning", first]
    assert [row["checkpoint"] for row in report.checkpoints] == [second, first]
    assert first in report.markdown
    assert second in report.markdown
    assert "not complete" in report.markdown


def test_report_of_a_long_run_shows_the_newest(store: Store, config: CheckpointConfig) -> None:
    """Orchestrators keep it in their databases: it does not grow with the run."""
    run = MadeRun(store, RUN)
    attempt = run.begin()
    made = [attempt.commit(step) for step in range(1, 106)]

    report = tasks.report(config.store, RUN)

    assert [row["checkpoint"] for row in report.checkpoints] == made[:-101:-1]
    assert "105 checkpoint(s)" in report.markdown
    assert "and 5 older checkpoints" in report.markdown


@pytest.mark.parametrize("result", ["recovery", "report", "verification"])
def test_results_are_json(store: Store, config: CheckpointConfig, result: str) -> None:
    """What a step returns survives JSON unchanged, so no orchestrator needs pickle for it."""
    run = MadeRun(store, RUN)
    attempt = run.begin()
    attempt.commit(8)
    made: Any = {
        "recovery": lambda: tasks.recover(_spec(config)),
        "report": lambda: tasks.report(config.store, RUN),
        "verification": lambda: tasks.verify(config.store, RUN),
    }[result]()

    assert msgspec.json.decode(msgspec.json.encode(made), type=type(made)) == made


def test_promote_without_a_registry_says_so(store: Store, config: CheckpointConfig) -> None:
    """Promotion needs a registry, and says which setting is missing."""
    with pytest.raises(ConfigError, match="tracking_uri"):
        tasks.promote(config, RUN, "step-00000008-a1-s1", "champion")


def test_unknown_registry_is_named_with_those_installed() -> None:
    """A mistyped kind names the registries that are there."""
    with pytest.raises(ConfigError, match="did you mean 'mlflow'"):
        load_registry(RegistryConfig(kind="mlfow", tracking_uri="sqlite:///x.db"))


def test_promote_points_an_alias_at_the_registered_version(
    store: Store, config: CheckpointConfig, tmp_path: Path
) -> None:
    """The alias follows to the version of the checkpoint asked for, and a live run stays live."""
    pytest.importorskip("mlflow")
    from ckpt_tasks.registry.base import RunDescription

    run = MadeRun(store, RUN)
    attempt = run.begin()
    first, second = attempt.commit(8), attempt.commit(16)
    registry_config = RegistryConfig(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    registry = load_registry(registry_config)
    description = RunDescription(
        run=RUN, uid=run.identity.uid, store_url=store.url, hyperparameters={"lr": 0.1}
    )
    registry.open_run(registry.create_run(description), description)
    for checkpoint in (first, second):
        run.register(registry, checkpoint)
    configured = CheckpointConfig(store=config.store, registry=registry_config)

    promotions = [tasks.promote(configured, RUN, c, "champion") for c in (second, first)]

    assert [p.registration.checkpoint for p in promotions] == [second, first]
    assert promotions[0].registration.version != promotions[1].registration.version
    assert _alias_target(registry_config, promotions[1].registration) == "1"
    assert _status(registry_config, promotions[1].registration) == "RUNNING"


def _alias_target(config: RegistryConfig, registration: Any) -> str:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=config.tracking_uri, registry_uri=config.tracking_uri)
    found = client.get_model_version_by_alias(registration.registered_model, "champion")
    return str(found.version)


def _status(config: RegistryConfig, registration: Any) -> str:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=config.tracking_uri, registry_uri=config.tracking_uri)
    return str(client.get_run(registration.run_id).info.status)


def test_steps_import_no_training_framework() -> None:
    """An orchestrator that imports the steps does not load torch or mlflow."""
    code = "import sys, ckpt_tasks.tasks; print({'torch', 'mlflow', 'prefect'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )

    assert done.stdout.strip() == "set()"
