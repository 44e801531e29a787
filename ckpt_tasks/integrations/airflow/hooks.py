"""Hooks: a store and a registry, set up once as Airflow connections.

Credentials of a connection become environment variables of the task's process while it needs
them, and of the trainer, which inherits them. They appear in no command line, log or record.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from airflow.sdk import BaseHook

from ckpt_tasks.config import RegistryConfig, StoreConfig
from ckpt_tasks.errors import CkptTasksError, ConfigError
from ckpt_tasks.integrations.airflow.connections import (
    Credentials,
    address_of,
    extra_of,
    find_connection,
    split_connection,
    storage_credentials,
    whole_identity,
)
from ckpt_tasks.masking import mask_text
from ckpt_tasks.tasks.credentials import environment

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["CheckpointHook", "MlflowHook"]

_STORE_EXTRAS = ("options", "single_writer", "storage_conn_id")
# MLflow's client asks again for minutes; somebody waits for the button's answer.
_IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


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

    def store(self) -> StoreConfig:
        """The store as configuration, without credentials.

        Raises
        ------
        ConfigError
            There is no such connection, or it cannot be a store.
        """
        return self._resolve()[0]

    def credentials(self) -> Credentials:
        """The storage's credentials. Raises `ConfigError`."""
        return storage_credentials(self._resolve()[1])

    def test_connection(self) -> tuple[bool, str]:
        """Whether the store can be opened for writing; for the button in Airflow's UI."""
        from ckpt_tasks.store import open_store

        try:
            with self.credentials().applied():
                open_store(self.store(), for_writing=True).close()
        except CkptTasksError as error:
            return False, str(error)
        return True, "the store can be written to"

    def _resolve(self) -> tuple[StoreConfig, str | None]:
        """The store, and the id of the connection that has its credentials."""
        connection = find_connection(self.ckpt_conn_id)
        extra = extra_of(connection)
        address = address_of(connection)
        if not address:
            raise ConfigError(
                f"connection {self.ckpt_conn_id!r} names no store: put its root, a path or a URL, "
                "in the field 'host'"
            )
        unknown = set(extra) - set(_STORE_EXTRAS)
        if unknown:
            raise ConfigError(
                f"connection {self.ckpt_conn_id!r}: unknown extra {sorted(unknown)}; it may hold "
                f"{', '.join(_STORE_EXTRAS)}"
            )
        url, conn_id = split_connection(address)
        # The URI form of a connection has s3://aws_default@bucket's first part as its login.
        return self._config(url, extra), extra.get("storage_conn_id", conn_id or connection.login)

    def _config(self, url: str, extra: dict[str, Any]) -> StoreConfig:
        fields = {"url": url}
        fields.update((name, extra[name]) for name in _STORE_EXTRAS[:2] if name in extra)
        try:
            # Not strict: in the URI form every value is text.
            return msgspec.convert(fields, StoreConfig, strict=False)
        except (msgspec.ValidationError, ConfigError) as error:
            raise ConfigError(f"connection {self.ckpt_conn_id!r}: {error}") from error


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

    def tracking_uri(self) -> str:
        """The server's address. Raises `ConfigError` where the connection has none."""
        connection = find_connection(self.mlflow_conn_id)
        address = address_of(connection)
        if not address or not connection.host:
            raise ConfigError(
                f"connection {self.mlflow_conn_id!r} names no MLflow server: put its address, such "
                "as https://mlflow.example.org or sqlite:////path/mlflow.db, in the field 'host'"
            )
        return address if ":/" in address else f"http://{address}"

    def registry(self, base: RegistryConfig) -> RegistryConfig:
        """`base` with this connection's server. Raises `ConfigError`."""
        return msgspec.structs.replace(base, tracking_uri=self.tracking_uri())

    def credentials(self) -> Credentials:
        """Name and password, or a token, as MLflow's client reads them. Raises `ConfigError`.

        Source: https://mlflow.org/docs/latest/self-hosting/security/basic-http-auth/
        """
        connection = find_connection(self.mlflow_conn_id)
        extra = extra_of(connection)
        variables = whole_identity(
            {
                "MLFLOW_TRACKING_USERNAME": connection.login,
                "MLFLOW_TRACKING_PASSWORD": connection.password,
                "MLFLOW_TRACKING_TOKEN": extra.get("token"),
            }
        )
        if extra.get("insecure_tls") in (True, "true", "True"):
            variables["MLFLOW_TRACKING_INSECURE_TLS"] = "true"
        return Credentials(variables=variables)

    def get_conn(self) -> MlflowClient:
        """A client of MLflow's own; use it within ``credentials().applied()``."""
        from mlflow import MlflowClient

        uri = self.tracking_uri()
        return MlflowClient(tracking_uri=uri, registry_uri=uri)

    def test_connection(self) -> tuple[bool, str]:
        """Whether the server answers; for the button in Airflow's UI."""
        from mlflow.exceptions import MlflowException

        try:
            with self.credentials().applied(), environment(_IMPATIENT):
                self.get_conn().search_experiments(max_results=1)
        except (CkptTasksError, MlflowException) as error:
            return False, mask_text(str(error))
        return True, "the MLflow server answers"
