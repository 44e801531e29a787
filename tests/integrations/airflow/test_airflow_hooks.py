"""Connections of every type, as the hooks read them and as child processes get them."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

from support import dag_home  # noqa: F401 - before Airflow is imported

# isort: split
import pytest
from support.mlflow_server import MlflowServer
from support.s3_servers import ACCESS_KEY, SECRET_KEY, S3Server

from ckpt_tasks.config import RegistryConfig, StoreConfig
from ckpt_tasks.errors import ConfigError
from ckpt_tasks.integrations.airflow.configuration import Settings
from ckpt_tasks.integrations.airflow.connections import storage_credentials
from ckpt_tasks.integrations.airflow.hooks import CheckpointHook, MlflowHook
from ckpt_tasks.store import open_store

SECRET = "hush-hush-secret"  # noqa: S105 - what must not be seen anywhere


@pytest.fixture(autouse=True)
def _no_identity_of_the_developer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "MLFLOW_", "CKPT_TASKS_", "AIRFLOW_CONN_")):
            monkeypatch.delenv(name)


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Defines a connection, as Airflow's environment does: a URI, or fields as JSON."""

    def define(conn_id: str, uri: str | None = None, **fields: Any) -> str:
        monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", uri or json.dumps(fields))
        return conn_id

    return define


@pytest.mark.parametrize(
    ("uri", "root"),
    [
        ("ckpt-tasks://s3://bucket/some/prefix", "s3://bucket/some/prefix"),
        ("ckpt-tasks:///data/checkpoints", "/data/checkpoints"),
        ("ckpt-tasks://%2Fdata%2Fcheckpoints", "/data/checkpoints"),
        ("ckpt-tasks://gs://bucket", "gs://bucket"),
    ],
)
def test_store_of_a_uri_has_its_whole_address(connect: Any, uri: str, root: str) -> None:
    """Airflow splits a URI over host and schema; the store's root is both again."""
    assert CheckpointHook(connect("store", uri)).store().url == root


def test_store_of_json_has_its_options(connect: Any) -> None:
    """The extra's options and single_writer are the store's."""
    conn = connect(
        "store",
        conn_type="ckpt_tasks",
        host="s3://bucket/prefix",
        extra={"options": {"use_ssl": False}, "single_writer": True},
    )

    assert CheckpointHook(conn).store() == StoreConfig(
        url="s3://bucket/prefix", options={"use_ssl": False}, single_writer=True
    )


def test_store_of_a_uri_has_its_options_from_text(connect: Any) -> None:
    """In a URI every extra is text, which is read as the option's type asks."""
    conn = connect("store", "ckpt-tasks://s3://bucket/p?single_writer=true")

    assert CheckpointHook(conn).store().single_writer is True


@pytest.mark.parametrize(
    "define",
    [
        {"conn_type": "ckpt_tasks", "host": "s3://keys@bucket/p"},
        {"conn_type": "ckpt_tasks", "host": "s3://bucket/p", "extra": {"storage_conn_id": "keys"}},
        {"uri": "ckpt-tasks://s3://keys@bucket/p"},
        {"uri": "ckpt-tasks://s3://bucket/p?storage_conn_id=keys"},
    ],
)
def test_store_names_the_connection_of_its_credentials(
    connect: Any, define: dict[str, Any]
) -> None:
    """In its root or in its extra, in JSON or in a URI; the root that remains is plain."""
    connect("keys", "aws://the-key:the-secret@")
    hook = CheckpointHook(connect("store", **define))

    assert hook.store().url == "s3://bucket/p"
    assert hook.credentials().variables["AWS_ACCESS_KEY_ID"] == "the-key"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "names no store.*'host'"),
        ({"host": "s3://b", "extra": {"bucket": "b"}}, r"unknown extra \['bucket'\].*options"),
        ({"host": "s3://b", "extra": "{not json"}, "'extra' is no JSON object"),
        ({"host": "s3://b", "extra": "[1]"}, "'extra' is no JSON object"),
        ({"host": "s3://b", "extra": {"single_writer": "perhaps"}}, "single_writer"),
        ({"host": "s3://b", "extra": {"options": {"secret": SECRET}}}, "is a credential"),
        ({"host": "s3://b", "extra": {"options": "x"}}, "options"),
    ],
)
def test_bad_store_connection_is_one_clear_error(
    connect: Any, fields: dict[str, Any], message: str
) -> None:
    """It names the connection and the field, and shows no secret."""
    conn = connect("store", conn_type="ckpt_tasks", **fields)

    with pytest.raises(ConfigError, match=message) as caught:
        CheckpointHook(conn).store()

    assert "'store'" in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("value", [None, "{this is no json"])
def test_missing_connection_is_named(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    """One that is not there, or that Airflow cannot read, says so and what to do."""
    if value is not None:
        monkeypatch.setenv("AIRFLOW_CONN_NOWHERE", value)
    for hook in (CheckpointHook("nowhere").store, MlflowHook("nowhere").tracking_uri):
        with pytest.raises(ConfigError, match=r"no Airflow connection 'nowhere'.*create it"):
            hook()


def test_aws_identity_replaces_the_one_of_the_worker_whole(
    connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session token or profile of the worker's own would spoil the connection's keys."""
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of another identity")
    monkeypatch.setenv("AWS_PROFILE", "of another identity")
    connect("keys", conn_type="aws", login="k", password=SECRET, extra={"region_name": "eu-west-1"})

    with storage_credentials("keys").applied():
        seen = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}

    assert seen == {
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "eu-west-1",
    }
    assert os.environ["AWS_SESSION_TOKEN"] == "of another identity"  # noqa: S105


def test_empty_aws_connection_leaves_the_identity_of_the_worker(
    connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An instance's own role is an empty connection, as Airflow's documentation says."""
    monkeypatch.setenv("AWS_PROFILE", "the worker's")
    connect("keys", conn_type="aws", extra={"endpoint_url": "http://127.0.0.1:1"})

    with storage_credentials("keys").applied():
        assert os.environ["AWS_PROFILE"] == "the worker's"
        assert os.environ["AWS_ENDPOINT_URL"] == "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"conn_type": "aws", "extra": {"role_arn": "arn:x"}}, "assumes the role 'arn:x'"),
        ({"conn_type": "http"}, "of the type 'http'.*'aws' or 'google_cloud_platform'"),
        (
            {"conn_type": "google_cloud_platform", "extra": {"impersonation_chain": "a@b"}},
            "impersonation_chain",
        ),
    ],
)
def test_credentials_that_a_trainer_cannot_take_are_refused(
    connect: Any, fields: dict[str, Any], message: str
) -> None:
    """Better than training for hours with the wrong identity, or until a key expires."""
    with pytest.raises(ConfigError, match=message):
        storage_credentials(connect("keys", **fields))


@pytest.mark.parametrize("prefix", ["", "extra__google_cloud_platform__"])
@pytest.mark.parametrize("as_text", [True, False])
def test_google_key_is_a_file_of_its_owner_only_and_goes_away(
    connect: Any, prefix: str, as_text: bool
) -> None:
    """Google's SDKs take a path; the file has mode 0600 and is gone after the block."""
    key = {"type": "service_account", "private_key": SECRET}
    extra = {
        f"{prefix}keyfile_dict": json.dumps(key) if as_text else key,
        f"{prefix}project": "p1",
    }
    connect("keys", conn_type="google_cloud_platform", extra=extra)

    with storage_credentials("keys").applied():
        file = Path(os.environ["GOOGLE_APPLICATION_CREDENTIALS"])
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert json.loads(file.read_text()) == key
        assert os.environ["GOOGLE_CLOUD_PROJECT"] == "p1"

    assert not file.exists()
    assert "GOOGLE_APPLICATION_CREDENTIALS" not in os.environ


def test_credentials_and_settings_show_no_secret(
    connect: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither their repr, nor the configuration, nor a log has what the connections hide."""
    connect("keys", conn_type="aws", login="k", password=SECRET)
    connect("tracking", conn_type="mlflow", host="http://m", extra={"token": SECRET})
    connect("google", conn_type="google_cloud_platform", extra={"keyfile_dict": {"k": SECRET}})

    config, credentials = Settings(store="s3://keys@bucket/p", mlflow_conn_id="tracking").resolve()

    shown = f"{config!r} {credentials!r} {storage_credentials('google')!r} {capfd.readouterr()!r}"
    assert SECRET not in shown
    assert credentials.variables["AWS_SECRET_ACCESS_KEY"] == SECRET
    assert credentials.variables["MLFLOW_TRACKING_TOKEN"] == SECRET


@pytest.mark.parametrize("service", [True, False])
def test_store_on_s3_is_reached_with_the_connections_alone(
    connect: Any, seaweedfs: S3Server, service: bool
) -> None:
    """Key, secret, region and endpoint come from the Amazon connection; the button agrees."""
    bucket, prefix = seaweedfs.new_place()
    endpoint = {"endpoint_url": seaweedfs.endpoint}
    extra = {"service_config": {"s3": endpoint}} if service else endpoint
    connect(
        "keys",
        conn_type="aws",
        login=ACCESS_KEY,
        password=SECRET_KEY,
        extra={**extra, "region_name": "us-east-1"},
    )
    hook = CheckpointHook(connect("store", f"ckpt-tasks://s3://keys@{bucket}/{prefix}"))

    assert hook.test_connection() == (True, "the store can be written to")
    with hook.credentials().applied():
        store = open_store(hook.store(), for_writing=True)
        store.create("some/record.json", b"{}")
        store.close()

    listed = seaweedfs.client().list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/some/")
    assert [item["Key"] for item in listed["Contents"]] == [f"{prefix}/some/record.json"]


def test_button_tells_why_a_store_cannot_be_written_to(connect: Any, seaweedfs: S3Server) -> None:
    """Wrong keys are told as such, and are not in the message."""
    connect(
        "keys",
        conn_type="aws",
        login=ACCESS_KEY,
        password=SECRET,
        extra={"endpoint_url": seaweedfs.endpoint, "region_name": "us-east-1"},
    )
    hook = CheckpointHook(connect("store", f"ckpt-tasks://s3://keys@{seaweedfs.bucket}/x"))

    works, message = hook.test_connection()

    assert not works
    assert SECRET not in message


@pytest.mark.parametrize(
    ("define", "uri"),
    [
        ({"conn_type": "mlflow", "host": "https://m.example"}, "https://m.example"),
        ({"conn_type": "mlflow", "host": "m.example", "port": 5000}, "http://m.example:5000"),
        (
            {"conn_type": "mlflow", "host": "https://m.example/sub", "port": 8443},
            "https://m.example:8443/sub",
        ),
        ({"conn_type": "mlflow", "host": "sqlite:////data/mlflow.db"}, "sqlite:////data/mlflow.db"),
        ({"uri": "mlflow://name:pass@m.example:5000/sub"}, "http://m.example:5000/sub"),
        ({"uri": "mlflow://https://m.example/sub"}, "https://m.example/sub"),
        ({"uri": "mlflow://databricks"}, "http://databricks"),
    ],
)
def test_tracking_uri_is_the_connections_whole_address(
    connect: Any, define: dict[str, Any], uri: str
) -> None:
    """Host, port and path of a URI or of the form's fields; the registry's rest is kept."""
    hook = MlflowHook(connect("tracking", **define))

    assert hook.tracking_uri() == uri
    registry = hook.registry(RegistryConfig(experiment="digits"))
    assert (registry.experiment, registry.tracking_uri) == ("digits", uri)


def test_tracking_uri_without_a_host_is_refused(connect: Any) -> None:
    """Also in the URI form of a database, of which Airflow drops the scheme."""
    for define in ({"conn_type": "mlflow"}, {"uri": "mlflow://sqlite:////data/mlflow.db"}):
        with pytest.raises(ConfigError, match="names no MLflow server"):
            MlflowHook(connect("tracking", **define)).tracking_uri()


def test_mlflow_token_is_not_overruled_by_a_name_of_the_worker(
    connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow prefers a user name in the environment, so that is taken away meanwhile."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "somebody")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "else")
    connect(
        "tracking",
        conn_type="mlflow",
        host="http://m",
        extra={"token": SECRET, "insecure_tls": True},
    )

    with MlflowHook("tracking").credentials().applied():
        seen = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}

    assert seen == {"MLFLOW_TRACKING_TOKEN": SECRET, "MLFLOW_TRACKING_INSECURE_TLS": "true"}


def test_mlflow_hook_gives_a_client_of_a_real_server(
    connect: Any, mlflow_server: MlflowServer
) -> None:
    """The client reads and writes there, and the button says that the server answers."""
    connect("tracking", conn_type="mlflow", host="127.0.0.1", port=mlflow_server.port)
    hook = MlflowHook("tracking")

    assert hook.test_connection() == (True, "the MLflow server answers")
    experiment = hook.get_conn().create_experiment("made-by-the-hook")
    assert hook.get_conn().get_experiment(experiment).name == "made-by-the-hook"


def test_button_tells_that_no_mlflow_server_answers(connect: Any) -> None:
    """Where nothing listens, somebody waits for the answer: no minutes of retries."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        connect("tracking", conn_type="mlflow", host="127.0.0.1", port=unused.getsockname()[1])

        works, message = MlflowHook("tracking").test_connection()

    assert not works
    assert "127.0.0.1" in message
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_children_inherit_the_credentials_and_no_command_line_has_them(connect: Any) -> None:
    """What the trainer gets is in its environment, of which others see nothing."""
    connect("keys", conn_type="aws", login="k", password=SECRET)
    code = "import os, sys; print(os.environ['AWS_SECRET_ACCESS_KEY'], sys.argv)"

    with storage_credentials("keys").applied():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    secret, arguments = done.stdout.split(" ", 1)
    assert secret == SECRET
    assert SECRET not in arguments
