"""The connection to MLflow: one explicit client, bounded waiting, and one kind of error."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import mlflow
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException
from urllib3.exceptions import ResponseError

from ckpt_tasks.errors import CkptTasksError, ConfigError, RegistryError, RegistryRefusedError
from ckpt_tasks.integrations.mlflow import database
from ckpt_tasks.masking import mask_text, mask_url

__all__ = ["Connection", "error_code"]

_DEFAULTS = {
    # No second try inside MLflow's HTTP client: a request whose answer was lost may have been
    # done, and only a search tells. The caller repeats the whole call, which begins with one.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_CHATTY_LOGGERS = ("alembic", "mlflow.store.db.utils", "mlflow.store.model_registry")
_TRACKING_URI = "MLFLOW_TRACKING_URI"
_MAX_MESSAGE = 600
_REFUSALS = frozenset({400, 404, 409, 413, 422})
"""Statuses that are about the request. Not 401 and 403, which say that no request is welcome."""


class Connection:
    """A lazily opened `MlflowClient`.

    Parameters
    ----------
    tracking_uri
        Of the tracking server or database; it is the model registry's too.
    """

    def __init__(self, tracking_uri: str) -> None:
        self.tracking_uri = tracking_uri
        self.shown_uri = mask_url(tracking_uri)
        self._client: MlflowClient | None = None
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        for name in _CHATTY_LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)

    @property
    def client(self) -> MlflowClient:
        """The client; for a database the first use also makes its tables."""
        if self._client is None:
            try:
                self._client = self._opened()
            except UnsupportedModelRegistryStoreURIException as error:
                raise self._unusable("is nothing that MLflow opens") from error
            except MlflowException as error:
                if "MLFLOW_ALLOW_FILE_STORE" not in str(error):
                    raise
                raise self._unusable("is a folder, which MLflow no longer writes to") from error
        return self._client

    def _opened(self) -> MlflowClient:
        with database.opening(self.tracking_uri):
            client = MlflowClient(self.tracking_uri, registry_uri=self.tracking_uri)
            if database.is_database(self.tracking_uri):
                # The client opens the registry of models, which makes tables too, at its first use.
                client.search_registered_models(max_results=1)
        return client

    def _unusable(self, why: str) -> ConfigError:
        return ConfigError(
            f"registry.tracking_uri = {self.shown_uri!r} {why}; give the URL of an MLflow "
            "server, or sqlite:///PATH"
        )

    @property
    def is_server(self) -> bool:
        """Whether a server answers, which also has pages for people."""
        return self.tracking_uri.startswith(("http://", "https://"))

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Turn whatever MLflow raises into a `RegistryError` that says what was being done, and
        into a `RegistryRefusedError` where it has understood the request and refuses it.

        Everything is caught, for MLflow lets the errors of its plugins through: of database
        drivers, of artifact stores, of HTTP.
        """
        try:
            yield
        except CkptTasksError:
            raise
        except Exception as error:
            whole = " ".join(str(error).split())
            text = _unreachable(error) or f"{type(error).__name__}: {whole}"
            message = f"MLflow at {self.shown_uri} did not {what}: {mask_text(text)[:_MAX_MESSAGE]}"
            # A cause with credentials in its message must not reach a traceback.
            kind = RegistryRefusedError if _is_refusal(error) else RegistryError
            raise kind(message) from (error if mask_text(whole) == whole else None)

    @contextmanager
    def as_default(self) -> Iterator[None]:
        """Make this database the one that MLflow's own code opens by default.

        Without a server it is `MlflowClient`, in this process, that resolves ``models:/<id>``
        as a version's source, and it asks the default tracking URI instead of the client's.
        """
        if self.is_server:
            yield
            return
        before = os.environ.get(_TRACKING_URI)
        os.environ[_TRACKING_URI] = self.tracking_uri
        try:
            if mlflow.get_tracking_uri() != self.tracking_uri:
                raise RegistryError(
                    "this process has called mlflow.set_tracking_uri with another URI than "
                    f"{self.shown_uri}; register from a process of its own"
                )
            yield
        finally:
            if before is None:
                del os.environ[_TRACKING_URI]
            else:
                os.environ[_TRACKING_URI] = before

    def close(self) -> None:
        """Forget the client; the next use opens another."""
        self._client = None


def error_code(error: MlflowException) -> str:
    """MLflow's name of the error: ``RESOURCE_ALREADY_EXISTS``, ..."""
    return str(error.error_code)


def _unreachable(error: Exception) -> str | None:
    """Why there is no answer, as the system says it: the innermost cause, for `requests` wraps it
    in five more, each of which repeats the others.
    """
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    if isinstance(chain[-1], ResponseError):  # "too many 503 error responses"
        status = "".join(filter(str.isdigit, str(chain[-1])))
        return f"it answered with HTTP status {status}"
    if any(isinstance(link, requests.exceptions.ChunkedEncodingError) for link in chain):
        return "its answer was cut off"
    if not any(isinstance(link, requests.ConnectionError | requests.Timeout) for link in chain):
        return None
    last = chain[-1]
    if isinstance(last, TimeoutError):
        return "it did not answer in time"
    said = last.strerror if isinstance(last, OSError) and last.strerror else str(last)
    return " ".join(said.split())


def _is_refusal(error: Exception) -> bool:
    """Whether MLflow refuses this request, rather than being away or unable to serve any.

    A database opened directly raises the same codes as a server answers; its own errors are
    503 where the connection failed, else 400 (`mlflow.store.db.utils`).
    """
    if isinstance(error, MlflowException):
        # No such endpoint: another server answers in its place, a proxy's own page for one.
        status = error.get_http_status_code()  # type: ignore[no-untyped-call]
        return status in _REFUSALS and error_code(error) != "ENDPOINT_NOT_FOUND"
    if isinstance(error, requests.HTTPError) and error.response is not None:  # of an artifact
        return error.response.status_code in _REFUSALS
    return isinstance(error, ValueError | TypeError | OverflowError) and not isinstance(
        error, OSError
    )  # the client's own check of the values; errors of HTTP are an OSError as well
