"""Configuration: where it comes from, what wins, and what wrong values say."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tasks.config import (
    AttemptConfig,
    CheckpointConfig,
    DashboardConfig,
    RegistryConfig,
    RetentionConfig,
    ScheduleConfig,
    StoreConfig,
    load_config,
    parse_duration,
)
from ckpt_tasks.errors import ConfigError
from ckpt_tasks.spelling import Best, parse_best


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    """A file with something in every section."""
    path = tmp_path / "run.toml"
    path.write_text(
        """
        [store]
        url = "s3://bucket/prefix"
        options = { endpoint_url = "http://127.0.0.1:1", anon = false }
        [schedule]
        every_steps = 500
        every = "1h30m"
        [registry]
        tracking_uri = "sqlite:///mlflow.db"
        hyperparameter_tags = ["lr"]
        [attempt]
        takeover_after = 90
        nproc = 4
        """
    )
    return path


def test_nothing_given_means_the_defaults() -> None:
    """Without file, environment and arguments, the documented defaults hold."""
    assert load_config(environ={}) == CheckpointConfig()


def test_a_file_sets_every_section(toml: Path) -> None:
    """TOML's types arrive as the models' types, durations as seconds."""
    assert load_config(toml, environ={}) == CheckpointConfig(
        store=StoreConfig(
            url="s3://bucket/prefix",
            options={"endpoint_url": "http://127.0.0.1:1", "anon": False},
        ),
        schedule=ScheduleConfig(every_steps=500, every=5400.0),
        registry=RegistryConfig(tracking_uri="sqlite:///mlflow.db", hyperparameter_tags=["lr"]),
        attempt=AttemptConfig(takeover_after=90.0, nproc=4),
    )


def test_arguments_win_over_environment_over_file(toml: Path) -> None:
    """The same key in all three places takes the argument, then the variable, then the file."""
    environ = {
        "CKPT_TASKS_SCHEDULE_EVERY_STEPS": "20",
        "CKPT_TASKS_SCHEDULE_EVERY": "5s",
        "CKPT_TASKS_ATTEMPT_NPROC": "2",
    }
    config = load_config(toml, environ, {"schedule.every_steps": 7})
    assert config.schedule == ScheduleConfig(every_steps=7, every=5.0)
    assert config.attempt == AttemptConfig(takeover_after=90.0, nproc=2)
    assert load_config(toml, environ, {"attempt.nproc": 3}).attempt.nproc == 3
    assert config.store.url == "s3://bucket/prefix"


def test_the_environment_can_name_the_file(toml: Path) -> None:
    """`CKPT_TASKS_CONFIG` is read where no file is given."""
    config = load_config(environ={"CKPT_TASKS_CONFIG": str(toml)})
    assert config.schedule.every_steps == 500


def test_text_becomes_what_the_field_is() -> None:
    """Variables are text; numbers, booleans, lists and mappings are read from it."""
    config = load_config(
        environ={
            "CKPT_TASKS_STORE_URL": "5",
            "CKPT_TASKS_STORE_SINGLE_WRITER": "true",
            "CKPT_TASKS_STORE_OPTIONS": '{"anon": true}',
            "CKPT_TASKS_SCHEDULE_FINAL": "false",
            "CKPT_TASKS_REGISTRY_HYPERPARAMETER_TAGS": '["lr", "epochs"]',
            "CKPT_TASKS_ATTEMPT_WITHOUT_COMMIT": "9",
            "UNRELATED": "x",
        }
    )
    assert config == CheckpointConfig(
        store=StoreConfig(url="5", single_writer=True, options={"anon": True}),
        schedule=ScheduleConfig(final=False),
        registry=RegistryConfig(hyperparameter_tags=["lr", "epochs"]),
        attempt=AttemptConfig(without_commit=9),
    )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10m", 600), ("1h30m", 5400), ("2d", 172800), ("600", 600), ("0.5s", 0.5)],
)
def test_durations_are_read(text: str, seconds: float) -> None:
    """Units are days, hours, minutes and seconds, largest first; plain numbers are seconds."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10 m", "5x", "-5s", "30m1h", "1e3", "500ms", "٣s"])
def test_other_texts_are_no_durations(text: str) -> None:
    """A text that is not exactly a duration is refused with an example of one."""
    with pytest.raises(ValueError, match="1h30m"):
        parse_duration(text)


@given(st.integers(0, 5), st.integers(0, 23), st.integers(0, 59), st.integers(1, 59))
def test_every_spelled_duration_is_its_sum(days: int, hours: int, minutes: int, rest: int) -> None:
    """A duration equals the sum of its parts."""
    expected = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    assert parse_duration(f"{days}d{hours}h{minutes}m{rest}s") == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[schedul]\nevery_steps = 1", ["'schedul'", "run.toml", "did you mean 'schedule'"]),
        ("[schedule]\nevery_step = 1", ["'every_step'", "run.toml", "did you mean 'every_steps'"]),
        ("[schedule]\nevery_steps = 0", ["schedule.every_steps = 0", "run.toml", ">= 1"]),
        ("[schedule]\nevery_steps = 'x'", ["every_steps = 'x'", "run.toml", "int"]),
        ("[schedule]\nevery = 'soon'", ["every = 'soon'", "run.toml", "'10m'"]),
        ("schedule = 1", ["run.toml", "[schedule]"]),
        ("[schedule", ["run.toml", "TOML"]),
        ("[save]\non_error = 'stopp'", ["on_error = 'stopp'", "run.toml", "did you mean 'stop'"]),
        ("[save]\non_error = 'x'", ["on_error = 'x'", "valid values: continue, stop"]),
        ("[registry]\nbest = 'loss'", ["'loss'", "METRIC:min", "run.toml"]),
        ("[store]\noptions = {secret = 'hunter2'}", ["options.secret", "environment"]),
        ("[attempt]\nheartbeat = 30", ["3 x attempt.heartbeat", "late heartbeat", "run.toml"]),
    ],
)
def test_a_wrong_file_names_what_and_where(
    tmp_path: Path, content: str, expected: list[str]
) -> None:
    """The message names the key or value, the file, and the nearest or an allowed one."""
    path = tmp_path / "run.toml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path, environ={})
    assert [part for part in expected if part not in str(caught.value)] == []
    assert "hunter2" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A configuration file that is not there is an error, not an empty configuration."""
    with pytest.raises(ConfigError, match=r"none\.toml: No such file"):
        load_config(tmp_path / "none.toml", environ={})


def test_a_wrong_variable_names_the_nearest() -> None:
    """A misspelt variable of a known section is refused."""
    with pytest.raises(ConfigError, match="did you mean 'CKPT_TASKS_STORE_URL'"):
        load_config(environ={"CKPT_TASKS_STORE_URI": "x"})


def test_a_wrong_variable_value_names_the_variable() -> None:
    """A value that cannot be read names the variable it came from."""
    with pytest.raises(ConfigError, match="environment: CKPT_TASKS_SCHEDULE_EVERY_STEPS"):
        load_config(environ={"CKPT_TASKS_SCHEDULE_EVERY_STEPS": "many"})


def test_a_wrong_argument_names_itself() -> None:
    """Wrong overrides are named as arguments."""
    with pytest.raises(ConfigError, match=r"argument registry\.experimnt.*'experiment'"):
        load_config(environ={}, overrides={"registry.experimnt": "x"})


@pytest.mark.parametrize(
    "build",
    [
        lambda: ScheduleConfig(every_steps=0),
        lambda: ScheduleConfig(every="10m"),  # type: ignore[arg-type]
        lambda: AttemptConfig(heartbeat=-1.0),
        lambda: StoreConfig(url=""),
        lambda: StoreConfig(options={"key": "AKIA"}),
    ],
)
def test_constructors_check_too(build: object) -> None:
    """A model made in code is checked like one that was read."""
    with pytest.raises(ConfigError):
        build()  # type: ignore[operator]


def test_a_configuration_survives_json(toml: Path) -> None:
    """A configuration reaches the trainer as JSON, unchanged."""
    config = load_config(toml, environ={})
    data = msgspec.json.encode(config)
    assert msgspec.json.decode(data, type=CheckpointConfig) == config


@pytest.mark.parametrize(
    "text",
    [
        '{"client_secret": "hush-hush"',
        '{"client_kwargs": {"aws_secret_access_key": "hush-hush"},}',
        "hush-hush",
        '["hush-hush"]',
    ],
)
def test_options_that_cannot_be_read_are_not_shown(text: str) -> None:
    """Malformed options may hold a credential, so the message names the variable alone."""
    with pytest.raises(ConfigError, match="CKPT_TASKS_STORE_OPTIONS") as caught:
        load_config(environ={"CKPT_TASKS_STORE_OPTIONS": text})
    assert "hush-hush" not in str(caught.value)


def test_options_of_a_wrong_type_are_masked() -> None:
    """What is no secret stays readable."""
    with pytest.raises(ConfigError) as caught:
        StoreConfig(options={"anon": True, "client_secret": "hush-hush", 3: "x"})  # type: ignore[dict-item]
    assert "hush-hush" not in str(caught.value)
    assert "'anon': True" in str(caught.value)


def test_repr_shows_no_credentials() -> None:
    """Orchestrators log and keep what they are given as text."""
    config = CheckpointConfig(
        registry=RegistryConfig(tracking_uri="https://me:hush@mlflow.example.org/?token=hush")
    )
    assert "mlflow.example.org" in repr(config)
    assert "hush" not in repr(config)
    assert repr(ScheduleConfig(every_steps=3)).startswith("ScheduleConfig(every_steps=3, ")


def test_dashboard_has_a_page_for_each_run() -> None:
    """The run's name stands where it belongs, whatever it is; without an address there is none."""
    dashboard = DashboardConfig(url="https://ckpt.example.org/runs/{run}")
    assert dashboard.page("a b/c") == "https://ckpt.example.org/runs/a%20b%2Fc"
    assert DashboardConfig().page("x") is None
    with pytest.raises(ConfigError, match="no address of a page"):
        DashboardConfig(url="ckpt.example.org")


def test_retention_is_read_from_text(tmp_path: Path) -> None:
    """Durations and sizes as people write them; rules as flags write them."""
    file = tmp_path / "c.toml"
    file.write_text('[retention]\nmax_age = "2d"\nmax_bytes = "5GB"\nbuckets = ["all:1h"]\n')
    environ = {"CKPT_TASKS_RETENTION_BEST": '["2:a:b:max"]', "CKPT_TASKS_RETENTION_GRACE": "90s"}
    found = load_config(file, environ, {"retention.latest": "3"}).retention
    assert found == RetentionConfig(
        latest=3,
        best=["2:a:b:max"],
        buckets=["all:1h"],
        max_age=172800.0,
        max_bytes=5 * 10**9,
        grace=90.0,
    )
    assert parse_best(found.best[0]) == Best(2, "a:b", "max")
    assert not found.keeps_everything
    assert RetentionConfig(grace=5.0).keeps_everything


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("best", ["loss"], "which way is better"),
        ("best", ["0:loss:min"], "does not say how many"),
        ("buckets", ["1h"], "EVERY:FOR|not a duration"),
        ("buckets", ["1d:1h"], "the second longer"),
        ("buckets", ["0:1h"], "EVERY:FOR"),
        ("latest", 0, "retention.latest = 0"),
        ("max_bytes", "5 apples", "is not a size"),
        ("grace", 0, "retention.grace = 0"),
    ],
)
def test_retention_that_cannot_work_is_refused(key: str, value: object, says: str) -> None:
    """Before anything is marked."""
    with pytest.raises(ConfigError, match=says):
        load_config(None, {}, {f"retention.{key}": value})
