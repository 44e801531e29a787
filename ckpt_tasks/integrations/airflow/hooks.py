"""Hooks: a store and a registry, set up once as Airflow connections.

Credentials of a connection become environment variables of the task's process while it needs
them, and of the trainer, which inherits them. They appear in no command line, log or record.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from airflow.sdk import BaseHook, Connection

from ckpt_tasks.config import RegistryConfig, StoreConfig
from ckpt_tasks.errors import CkptTasksError, ConfigError
from ckpt_tasks.tasks.credentials import environment

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["CheckpointHook", "MlflowHook", "split_connection"]


def split_connection(url: str) -> tuple[str, str | None]:
    """Take the connection's id out of a URL that names one, as Airflow's object storage does.

    ``s3://aws_default@bucket/prefix`` is ``s3://bucket/prefix`` with the connection
    ``aws_default``.
    """
    parts = urlsplit(url)
    conn_id, separator, host = parts.netloc.rpartition("@")
    if not separator or ":" in conn_id:
        return url, None
    return urlunsplit(parts._replace(netloc=host)), conn_id


class CheckpointHook(BaseHook):
    """A checkpoint store, from a connection of the type ``ckpt_tasks``.

    Of the connection, *host* is the store's root (a path, or a URL such as
    ``s3://bucket/prefix``), and *extra* may hold ``options`` (for the file system, as fsspec
    names them), ``single_writer``, and ``storage_conn_id``: the Amazon or Google connection that
    has the credentials. A root that names it, ``s3://aws_default@bucket/prefix``, works too.

    Parameters
    ----------
    ckpt_conn_id
        Id of the connection.
    """

    conn_name_attr = "ckpt_conn_id"
    default_conn_name = "ckpt_tasks_default"
    conn_type = "ckpt_tasks"
    hook_name = "Checkpoint store"

    def __init__(self, ckpt_conn_id: str = default_conn_name) -> None:
        super().__init__()
        self.ckpt_conn_id = ckpt_conn_id

    @classmethod
    def get_ui_field_behaviour(cls) -> dict[str, Any]:
        """The connection's form."""
        return {
            "hidden_fields": ["schema", "login", "password", "port"],
            "relabeling": {"host": "Root of the store"},
            "placeholders": {
                "host": "s3://bucket/checkpoints",
                "extra": '{"storage_conn_id": "aws_default"}',
            },
        }

    def store(self) -> StoreConfig:
        """The store as configuration, without credentials.

        Raises
        ------
        ConfigError
            There is no such connection, or it cannot be a store.
        """
        return self._resolve()[0]

    @contextmanager
    def credentials(self) -> Iterator[None]:
        """Have the storage's credentials in the environment within the block.

        Raises `ConfigError`.
        """
        with storage_credentials(self._resolve()[1]):
            yield

    def test_connection(self) -> tuple[bool, str]:
        """Whether the store can be opened for writing; for the button in Airflow's UI."""
        from ckpt_tasks.store import open_store

        try:
            with self.credentials():
                open_store(self.store(), for_writing=True).close()
        except CkptTasksError as error:
            return False, str(error)
        return True, "the store can be written to"

    def _resolve(self) -> tuple[StoreConfig, str | None]:
        connection = find_connection(self.ckpt_conn_id)
        extra = _extra(connection)
        if not connection.host:
            raise ConfigError(
                f"connection {self.ckpt_conn_id!r} names no store: put its root, a path or a URL, "
                "in the field 'host'"
            )
        unknown = set(extra) - {"options", "single_writer", "storage_conn_id"}
        if unknown:
            raise ConfigError(
                f"connection {self.ckpt_conn_id!r}: unknown extra {sorted(unknown)}; it may hold "
                "options, single_writer and storage_conn_id"
            )
        url, conn_id = split_connection(connection.host)
        config = StoreConfig(
            url=url,
            options=extra.get("options", {}),
            single_writer=extra.get("single_writer", False),
        )
        return config, extra.get("storage_conn_id", conn_id)


class MlflowHook(BaseHook):
    """An MLflow tracking server, from a connection of the type ``mlflow``.

    Of the connection, *host* is the server's address or another tracking URI (``https://...``,
    ``sqlite:///...``), *port* its port, *login* and *password* those of basic authentication;
    *extra* may hold ``token`` and ``insecure_tls``.

    Parameters
    ----------
    mlflow_conn_id
        Id of the connection.
    """

    conn_name_attr = "mlflow_conn_id"
    default_conn_name = "mlflow_default"
    conn_type = "mlflow"
    hook_name = "MLflow"

    def __init__(self, mlflow_conn_id: str = default_conn_name) -> None:
        super().__init__()
        self.mlflow_conn_id = mlflow_conn_id

    @classmethod
    def get_ui_field_behaviour(cls) -> dict[str, Any]:
        """The connection's form."""
        return {
            "hidden_fields": ["schema"],
            "relabeling": {"host": "Tracking URI"},
            "placeholders": {"host": "https://mlflow.example.org", "extra": '{"token": "..."}'},
        }

    def tracking_uri(self) -> str:
        """The server's address. Raises `ConfigError` where the connection has none."""
        connection = find_connection(self.mlflow_conn_id)
        host = connection.host
        if not host:
            raise ConfigError(
                f"connection {self.mlflow_conn_id!r} names no MLflow server: put its address in "
                "the field 'host'"
            )
        uri = host if ":/" in host else f"http://{host}"
        return f"{uri.rstrip('/')}:{connection.port}" if connection.port else uri

    def registry(self, base: RegistryConfig) -> RegistryConfig:
        """`base` with this connection's server. Raises `ConfigError`."""
        from msgspec.structs import replace

        return replace(base, tracking_uri=self.tracking_uri())

    @contextmanager
    def credentials(self) -> Iterator[None]:
        """Have the credentials in the environment within the block, as MLflow's client reads them.

        Source: https://mlflow.org/docs/latest/self-hosting/security/basic-http-auth/
        """
        connection = find_connection(self.mlflow_conn_id)
        extra = _extra(connection)
        variables = {
            "MLFLOW_TRACKING_USERNAME": connection.login,
            "MLFLOW_TRACKING_PASSWORD": connection.password,
            "MLFLOW_TRACKING_TOKEN": extra.get("token"),
            "MLFLOW_TRACKING_INSECURE_TLS": "true" if extra.get("insecure_tls") else None,
        }
        with environment(_given(variables)):
            yield

    def get_conn(self) -> MlflowClient:
        """A client of MLflow's own; use it within `credentials`."""
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.tracking_uri())

    def test_connection(self) -> tuple[bool, str]:
        """Whether the server answers; for the button in Airflow's UI."""
        from mlflow.exceptions import MlflowException

        try:
            with self.credentials():
                self.get_conn().search_experiments(max_results=1)
        except (CkptTasksError, MlflowException) as error:
            return False, str(error)
        return True, "the MLflow server answers"


def find_connection(conn_id: str) -> Connection:
    """The connection. Raises `ConfigError` where there is none of this id."""
    from airflow.sdk.exceptions import AirflowNotFoundException

    try:
        return BaseHook.get_connection(conn_id)
    except AirflowNotFoundException as error:
        raise ConfigError(
            f"there is no Airflow connection {conn_id!r}; create it, or name another one"
        ) from error


@contextmanager
def storage_credentials(conn_id: str | None) -> Iterator[None]:
    """Credentials of an Amazon or Google connection as the environment variables of their SDKs.

    Parameters
    ----------
    conn_id
        Of the type ``aws`` or ``google_cloud_platform``; ``None``: those that the environment
        has already.

    Raises
    ------
    ConfigError
        There is no such connection, or it asks for what this cannot do.
    """
    if conn_id is None:
        yield
        return
    connection = find_connection(conn_id)
    with ExitStack() as stack:
        if connection.conn_type == "aws":
            stack.enter_context(environment(_aws_variables(connection)))
        elif connection.conn_type == "google_cloud_platform":
            stack.enter_context(_google_key(connection))
        else:
            raise ConfigError(
                f"connection {conn_id!r} is of the type {connection.conn_type!r}; credentials of "
                "a store come from 'aws' or 'google_cloud_platform', or from the environment"
            )
        yield


def _aws_variables(connection: Connection) -> dict[str, str]:
    extra = _extra(connection)
    if extra.get("role_arn"):
        raise ConfigError(
            f"connection {connection.conn_id!r} assumes the role {extra['role_arn']!r}, and its "
            "short-lived keys would expire while training; give the worker the role, or name a "
            "'profile_name' that assumes it"
        )
    return _given(
        {
            "AWS_ACCESS_KEY_ID": connection.login,
            "AWS_SECRET_ACCESS_KEY": connection.password,
            "AWS_SESSION_TOKEN": extra.get("aws_session_token"),
            "AWS_DEFAULT_REGION": extra.get("region_name"),
            "AWS_ENDPOINT_URL": extra.get("endpoint_url"),
            "AWS_PROFILE": extra.get("profile_name"),
        }
    )


@contextmanager
def _google_key(connection: Connection) -> Iterator[None]:
    extra = _extra(connection)
    key = extra.get("keyfile_dict")
    with ExitStack() as stack:
        path = extra.get("key_path")
        if key:
            # Google's SDKs take a file's path only; this one is readable by nobody else.
            file = stack.enter_context(tempfile.NamedTemporaryFile("w", suffix=".json"))
            file.write(key if isinstance(key, str) else json.dumps(key))
            file.flush()
            path = file.name
        variables = {
            "GOOGLE_APPLICATION_CREDENTIALS": path,
            "GOOGLE_CLOUD_PROJECT": extra.get("project"),
        }
        stack.enter_context(environment(_given(variables)))
        yield


def _extra(connection: Connection) -> dict[str, Any]:
    extra: dict[str, Any] = connection.extra_dejson
    if connection.extra and not extra and connection.extra.strip() != "{}":
        raise ConfigError(f"connection {connection.conn_id!r}: its field 'extra' is no JSON")
    return extra


def _given(variables: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in variables.items() if value}
