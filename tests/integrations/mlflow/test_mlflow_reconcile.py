"""MLflow is told from the store alone all that a training would have told it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from mlflow import MlflowClient
from mlflow.tracking._tracking_service.utils import _get_store
from support.launches import TOY, launched
from support.mlflow_contents import contents_of
from support.mlflow_server import free_port
from support.toy_runs import toy_spec

from ckpt_tasks.config import (
    AttemptConfig,
    CheckpointConfig,
    RegistryConfig,
    SaveConfig,
    ScheduleConfig,
)
from ckpt_tasks.tasks import ReconcileReport, promote, reconcile, verify
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import EXIT_DONE

EXPERIMENT = "reconciled"


def spec_at(root: Path, uri: str, *, drain: float = 120.0) -> TrainSpec:
    spec = toy_spec(root, entrypoint=f"{TOY}:train")
    config = msgspec.structs.replace(
        spec.config,
        schedule=ScheduleConfig(every_epochs=1),
        attempt=AttemptConfig(heartbeat=0.3, takeover_after=1.5, drain=drain),
        registry=RegistryConfig(tracking_uri=uri, experiment=EXPERIMENT, best="weight_norm:min"),
        save=SaveConfig(asynchronous=False),
    )
    return msgspec.structs.replace(spec, config=config)


def registering_at(config: CheckpointConfig, uri: str) -> CheckpointConfig:
    registry = msgspec.structs.replace(config.registry, tracking_uri=uri)
    return msgspec.structs.replace(config, registry=registry)


def train(spec: TrainSpec) -> None:
    with launched(spec) as attempt:
        assert attempt.outcome().code == EXIT_DONE, attempt.output


def kinds(report: ReconcileReport) -> set[str]:
    assert (report.problem, report.left) == (None, [])
    return {difference.kind for difference in report.changes}


def test_mlflow_holds_what_it_would_hold_without_an_outage(tmp_path: Path) -> None:
    """Away during a whole training, it is reconciled, and equals what a training with it there
    leaves, but for ids and times; made anew in an empty one, it equals itself, times as well.
    """
    databases = [f"sqlite:///{tmp_path}/{name}.db" for name in ("there", "away", "anew")]
    stores = [tmp_path / "there", tmp_path / "away"]
    with_mlflow = spec_at(stores[0], databases[0])
    without = spec_at(stores[1], f"http://127.0.0.1:{free_port()}", drain=1.0)
    for spec in (with_mlflow, without):
        train(spec)

    config = registering_at(without.config, databases[1])
    assert kinds(reconcile(config, "toy")) == {"run", "register", "metrics"}
    there, away = (
        contents_of(uri, EXPERIMENT, store=str(store), times=False)
        for uri, store in zip(databases[:2], stores, strict=True)
    )
    assert away == there
    assert there["aliases"].keys() == {"best", "resume-toy"}
    assert kinds(reconcile(config, "toy")) == set()

    assert kinds(reconcile(with_mlflow.config, "toy")) == set()
    newest = verify(with_mlflow.config.store, "toy").checkpoint
    promote(with_mlflow.config, "toy", newest, "candidate")
    anew = registering_at(with_mlflow.config, databases[2])
    plan = reconcile(anew, "toy", dry_run=True)
    assert reconcile(anew, "toy").changes == plan.changes
    exact = [contents_of(databases[i], EXPERIMENT, store=str(stores[0])) for i in (0, 2)]
    assert exact[1] == exact[0]
    assert exact[0]["aliases"].keys() == {"best", "candidate", "resume-toy"}
    assert kinds(reconcile(anew, "toy")) == set()

    damage_and_mend(anew, databases[2], exact[0], stores[0])


def damage_and_mend(
    config: CheckpointConfig, uri: str, whole: dict[str, object], store: Path
) -> None:
    """Whatever people and lost races do to it in MLflow."""
    client = MlflowClient(uri, registry_uri=uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    run_id = run.info.run_id

    first = client.get_model_version(EXPERIMENT, "1")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MLFLOW_TRACKING_URI", uri)  # the client itself resolves the source
        client.create_model_version(
            EXPERIMENT, source=str(first.source), run_id=run_id, model_id=first.model_id
        )
    client.create_run(experiment.experiment_id, tags={"ckpt.uid": run.data.tags["ckpt.uid"]})
    client.set_registered_model_alias(EXPERIMENT, "resume-toy", "1")
    client.update_run(run_id, status="RUNNING")
    assert kinds(reconcile(config, "toy")) == {"double", "twin", "alias", "status"}
    assert contents_of(uri, EXPERIMENT, store=str(store)) == whole

    client.delete_run(run_id)
    assert kinds(reconcile(config, "toy")) == {"run"}
    assert contents_of(uri, EXPERIMENT, store=str(store)) == whole

    client.delete_run(run_id)
    _get_store(uri)._hard_delete_run(run_id)  # as `mlflow gc` does
    assert kinds(reconcile(config, "toy")) == {"run", "register", "metrics", "alias"}
    assert contents_of(uri, EXPERIMENT, store=str(store)) == whole
    assert kinds(reconcile(config, "toy")) == set()
