from __future__ import annotations

from pathlib import Path

import pytest

from ckpt_tasks.config import (
    AttemptConfig,
    CheckpointConfig,
    DashboardConfig,
    RegistryConfig,
    SaveConfig,
    ScheduleConfig,
    StoreConfig,
)
from ckpt_tasks.errors import ConfigError
from ckpt_tasks.integrations.prefect import CheckpointStore, ModelRegistry
from ckpt_tasks.integrations.prefect.configuration import Settings

FILE = """
[store]
url = "from-file"
single_writer = true
[dashboard]
url = "https://from-file/{run}"
[save]
overlap = true
[schedule]
every_steps = 7
[registry]
experiment = "from-file"
[attempt]
grace = "12s"
nproc = 4
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration file that ``CKPT_TASKS_CONFIG`` names."""
    path = tmp_path / "ckpt.toml"
    path.write_text(FILE, encoding="utf-8")
    monkeypatch.setenv("CKPT_TASKS_CONFIG", str(path))
    return path


def test_nothing_configured_gives_sensible_defaults() -> None:
    """A folder, a save each epoch, no registry, and a grace within Prefect's own 30 seconds."""
    assert Settings().resolve() == CheckpointConfig(
        store=StoreConfig(url="checkpoints"),
        schedule=ScheduleConfig(every_epochs=1),
        attempt=AttemptConfig(grace=20.0),
    )


@pytest.mark.usefixtures("file")
def test_file_configures_every_section() -> None:
    """What no argument and no variable says comes from the file."""
    assert Settings().resolve() == CheckpointConfig(
        store=StoreConfig(url="from-file", single_writer=True),
        schedule=ScheduleConfig(every_steps=7),
        save=SaveConfig(overlap=True),
        registry=RegistryConfig(experiment="from-file"),
        attempt=AttemptConfig(grace=12.0, nproc=4),
        dashboard=DashboardConfig(url="https://from-file/{run}"),
    )


@pytest.mark.usefixtures("file")
def test_environment_wins_over_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable counts from when it is set, also after the flow was made, key by key."""
    settings = Settings()
    monkeypatch.setenv("CKPT_TASKS_STORE_URL", "from-environment")
    monkeypatch.setenv("CKPT_TASKS_SCHEDULE_EVERY", "10m")
    monkeypatch.setenv("CKPT_TASKS_REGISTRY_TRACKING_URI", "http://m")
    monkeypatch.setenv("CKPT_TASKS_SAVE_INCREMENTAL", "false")
    monkeypatch.setenv("CKPT_TASKS_ATTEMPT_WITHOUT_COMMIT", "9")
    monkeypatch.setenv("CKPT_TASKS_ATTEMPT_NPROC", "3")

    assert settings.resolve() == CheckpointConfig(
        store=StoreConfig(url="from-environment", single_writer=True),
        schedule=ScheduleConfig(every_steps=7, every=600.0),
        save=SaveConfig(overlap=True, incremental=False),
        registry=RegistryConfig(experiment="from-file", tracking_uri="http://m"),
        attempt=AttemptConfig(grace=12.0, without_commit=9, nproc=3),
        dashboard=DashboardConfig(url="https://from-file/{run}"),
    )


@pytest.mark.usefixtures("file")
def test_arguments_win_over_all_section_by_section() -> None:
    """An argument replaces its section; a store's URL and `nproc` stand for one key of theirs."""
    given = CheckpointConfig(
        store=StoreConfig(url="given"),
        schedule=ScheduleConfig(every_epochs=2),
        save=SaveConfig(asynchronous=False),
        registry=RegistryConfig(tracking_uri="http://given"),
        attempt=AttemptConfig(),
        dashboard=DashboardConfig(url="https://from-file/{run}"),  # no argument has it
    )
    whole = Settings(
        store=given.store,
        schedule=given.schedule,
        save=given.save,
        registry=given.registry,
        attempt=given.attempt,
    )

    assert whole.resolve() == given
    url_only = Settings(store="given").resolve().store
    assert url_only == StoreConfig(url="given", single_writer=True)
    assert Settings(nproc=2).resolve().attempt == AttemptConfig(grace=12.0, nproc=2)
    both = Settings(attempt=AttemptConfig(drain=1.0, nproc=8), nproc=2).resolve().attempt
    assert both == AttemptConfig(drain=1.0, nproc=2)


@pytest.mark.usefixtures("file")
def test_blocks_win_over_all() -> None:
    """Blocks are arguments: what they leave open has its default, not the environment's value."""
    store = CheckpointStore(url="s3://b/p", options={"endpoint_url": "http://minio"})
    registry = ModelRegistry(
        tracking_uri="http://m",
        best="loss:min",
        metrics="committed",
        hyperparameter_tags=["lr", "width"],
    )

    resolved = Settings(store=store, registry=registry).resolve()

    assert resolved.store == StoreConfig(url="s3://b/p", options={"endpoint_url": "http://minio"})
    assert resolved.registry == RegistryConfig(
        tracking_uri="http://m",
        best="loss:min",
        metrics="committed",
        hyperparameter_tags=["lr", "width"],
    )


def test_grace_within_prefects_patience_whatever_else_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another key of the section leaves Prefect's grace as it is; a grace of its own counts."""
    monkeypatch.setenv("CKPT_TASKS_ATTEMPT_HEARTBEAT", "1s")
    assert Settings().resolve().attempt == AttemptConfig(heartbeat=1.0, grace=20.0)

    monkeypatch.setenv("CKPT_TASKS_ATTEMPT_GRACE", "50s")
    assert Settings().resolve().attempt.grace == 50.0


def test_wrong_variable_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in the environment is an error with the nearest valid name, not ignored."""
    monkeypatch.setenv("CKPT_TASKS_STORE_URI", "x")

    with pytest.raises(ConfigError, match="CKPT_TASKS_STORE_URL"):
        Settings().resolve()


def test_what_cannot_be_is_refused_at_once() -> None:
    """An author's mistake is not left to the flow's first run."""
    with pytest.raises(ConfigError, match=r"store\.url"):
        Settings(store="")
    with pytest.raises(ConfigError, match=r"attempt\.nproc = 0"):
        Settings(nproc=0)
