"""Airflow connections as this package reads them: addresses, and credentials for child processes.

A connection comes from the form, as JSON or as a URI, and the URI form splits an address over
several fields: of ``ckpt-tasks://s3://bucket/prefix`` the host is ``s3://bucket`` and the schema
``prefix``.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from airflow.sdk import BaseHook, Connection

from ckpt_tasks.errors import ConfigError
from ckpt_tasks.masking import mask_url
from ckpt_tasks.tasks.credentials import environment

__all__ = [
    "Credentials",
    "address_of",
    "extra_of",
    "find_connection",
    "refuse_credentials",
    "split_connection",
    "storage_credentials",
    "whole_identity",
]

_GOOGLE_PREFIX = "extra__google_cloud_platform__"
_GOOGLE_UNSUPPORTED = ("credential_config_file", "impersonation_chain", "key_secret_name")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Credentials:
    """What the SDKs of clouds and MLflow read from the environment. Its repr shows none of it.

    Parameters
    ----------
    variables
        Environment variables; ``None`` for one that must not be set beside the others, as a
        session token of another identity.
    google_key
        A service account's key, for which Google's SDKs take a file's path only.
    """

    variables: Mapping[str, str | None] = dataclasses.field(default_factory=dict, repr=False)
    google_key: str | None = dataclasses.field(default=None, repr=False)

    def __or__(self, other: Credentials) -> Credentials:
        """Both; `other` wins."""
        return Credentials(
            variables={**self.variables, **other.variables},
            google_key=other.google_key or self.google_key,
        )

    @contextmanager
    def files(self) -> Iterator[dict[str, str | None]]:
        """The variables; a key is in a file that nobody else can read, within the block."""
        variables = dict(self.variables)
        if self.google_key is None:
            yield variables
            return
        with tempfile.NamedTemporaryFile("w", prefix="ckpt-tasks-", suffix=".json") as file:
            file.write(self.google_key)
            file.flush()
            yield {**variables, "GOOGLE_APPLICATION_CREDENTIALS": file.name}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Have them in this process' environment, and so in its children's, within the block."""
        with self.files() as variables, environment(variables):
            yield


def find_connection(conn_id: str) -> Connection:
    """The connection. Raises `ConfigError` where there is none of this id."""
    from airflow.sdk.exceptions import AirflowNotFoundException

    try:
        return BaseHook.get_connection(conn_id)
    except AirflowNotFoundException as error:
        raise ConfigError(
            f"there is no Airflow connection {conn_id!r}, or it cannot be read; create it "
            "(`airflow connections add`, or AIRFLOW_CONN_... in the environment), or name another"
        ) from error


def extra_of(connection: Connection) -> dict[str, Any]:
    """What is given in the field *extra*; a form leaves what is not as null or empty text.

    Raises `ConfigError` where it is no JSON object.
    """
    try:
        extra = json.loads(connection.extra or "{}")
    except ValueError:
        extra = None
    if not isinstance(extra, dict):
        raise ConfigError(f"connection {connection.conn_id!r}: its field 'extra' is no JSON object")
    # Read through Airflow too, which then masks the values in logs.
    return {n: v for n, v in connection.extra_dejson.items() if v is not None and v != ""}


def address_of(connection: Connection) -> str | None:
    """The address that *host*, *port* and *schema* spell together; ``None`` where there is none.

    ``http`` is meant where the host has no scheme, but a port.
    """
    host, path = connection.host or "", connection.schema or ""
    if not host:
        # A URI of the form ckpt-tasks:///data/store.
        return f"/{path.lstrip('/')}" if path else None
    if connection.port:
        parts = urlsplit(host if "://" in host else f"http://{host}")
        host = urlunsplit(parts._replace(netloc=f"{parts.netloc}:{connection.port}"))
    return f"{host.rstrip('/')}/{path.lstrip('/')}" if path else host


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


def refuse_credentials(address: Any) -> None:
    """Raise `ConfigError` for an address that has credentials in it.

    Airflow keeps an operator's arguments in its database and shows them in its pages.
    """
    if not isinstance(address, str):
        return  # none, or the output of a task
    bare = split_connection(address)[0]
    if mask_url(bare) != bare:
        raise ConfigError(
            f"{mask_url(bare)} has credentials in it, which Airflow would keep in its database "
            "and show; put them in a connection (ckpt_conn_id, or conn_id@ in the address)"
        )


def storage_credentials(conn_id: str | None) -> Credentials:
    """Credentials of an Amazon or Google connection.

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
        return Credentials()
    connection = find_connection(conn_id)
    if connection.conn_type == "aws":
        return _of_aws(connection)
    if connection.conn_type == "google_cloud_platform":
        return _of_google(connection)
    raise ConfigError(
        f"connection {conn_id!r} is of the type {connection.conn_type!r}; credentials of a store "
        "come from 'aws' or 'google_cloud_platform', or from the environment"
    )


def whole_identity(variables: Mapping[str, str | None]) -> dict[str, str | None]:
    """Variables that replace the process' own identity, all of them or none.

    A session token of the worker's would spoil a connection's keys, and MLflow prefers a user
    name to a token.
    """
    if not any(variables.values()):
        return {}
    return {name: value or None for name, value in variables.items()}


def _of_aws(connection: Connection) -> Credentials:
    """https://airflow.apache.org/docs/apache-airflow-providers-amazon/stable/connections/aws.html"""
    extra = extra_of(connection)
    if extra.get("role_arn"):
        raise ConfigError(
            f"connection {connection.conn_id!r} assumes the role {extra['role_arn']!r}, and its "
            "short-lived keys would expire while training; give the worker the role, or name a "
            "'profile_name' that assumes it"
        )
    identity = {
        "AWS_ACCESS_KEY_ID": connection.login,
        "AWS_SECRET_ACCESS_KEY": connection.password,
        "AWS_SESSION_TOKEN": extra.get("aws_session_token"),
        "AWS_PROFILE": extra.get("profile_name"),
    }
    service = extra.get("service_config", {}).get("s3", {})
    places = {
        "AWS_DEFAULT_REGION": extra.get("region_name"),
        "AWS_ENDPOINT_URL": extra.get("endpoint_url"),
        "AWS_ENDPOINT_URL_S3": service.get("endpoint_url"),
    }
    return Credentials(variables={**whole_identity(identity), **_given(places)})


def _of_google(connection: Connection) -> Credentials:
    """https://airflow.apache.org/docs/apache-airflow-providers-google/stable/connections/gcp.html"""
    extra = {n.removeprefix(_GOOGLE_PREFIX): v for n, v in extra_of(connection).items()}
    unsupported = [name for name in _GOOGLE_UNSUPPORTED if extra.get(name)]
    if unsupported:
        raise ConfigError(
            f"connection {connection.conn_id!r} asks for {', '.join(unsupported)}, which a trainer "
            "cannot take over; give 'keyfile_dict' or 'key_path', or the worker the identity"
        )
    key = extra.get("keyfile_dict") or None
    variables = {
        "GOOGLE_APPLICATION_CREDENTIALS": extra.get("key_path"),
        "GOOGLE_CLOUD_PROJECT": extra.get("project"),
    }
    return Credentials(
        variables=_given(variables),
        google_key=json.dumps(key) if isinstance(key, dict) else key,
    )


def _given(variables: Mapping[str, Any]) -> dict[str, str | None]:
    return {name: str(value) for name, value in variables.items() if value}
