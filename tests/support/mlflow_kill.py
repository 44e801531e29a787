"""Registers one checkpoint and is killed on the way; a program for the tests of MLflow.

For every request *n* to MLflow that the work consists of, a child does the work and ends itself
by SIGKILL just before that request, then a second child does it all. A process per kill, but one
import of MLflow for all: children are forks.

Usage: ``python mlflow_kill.py TRACKING_URI EXPERIMENT``. Prints the uids of the runs.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable
from typing import Any

import requests
from mlflow import MlflowClient

from ckpt_tasks.config import RegistryConfig
from ckpt_tasks.format.codec import encode
from ckpt_tasks.integrations.mlflow import MlflowRegistry, connection
from ckpt_tasks.testing.registry import example_description, example_record, rows_of

_MOST = 200
MANY = 150
"""Hyperparameters of the run."""


class Countdown:
    """Ends this process at the n-th call."""

    def __init__(self, calls: int) -> None:
        self._left = calls

    def __call__(self) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_at_request(countdown: Countdown) -> None:
    """Count HTTP requests, which several calls of the client consist of."""
    send = requests.Session.send

    def counted(self: requests.Session, *args: Any, **kwargs: Any) -> requests.Response:
        countdown()
        return send(self, *args, **kwargs)

    requests.Session.send = counted  # type: ignore[method-assign]


def kill_at_call(countdown: Countdown) -> None:
    """Count calls of the client: a database opened directly sees no requests."""

    class CountedClient(MlflowClient):
        def __getattribute__(self, name: str) -> Any:
            found = super().__getattribute__(name)
            if not name.startswith("_") and callable(found):
                countdown()
            return found

    connection.MlflowClient = CountedClient  # type: ignore[misc]


def work(uri: str, experiment: str, uid: str) -> None:
    """What a registrar does with a run's first checkpoint."""
    registry = MlflowRegistry(RegistryConfig(tracking_uri=uri, experiment=experiment))
    many = {f"layers.{n}.width": n for n in range(MANY)}  # more than one request takes
    description = example_description(uid=uid, run="killed", hyperparameters=many)
    ids = registry.find_run(description) or registry.create_run(description)
    registry.open_run(ids, description)
    registry.log_metrics(rows_of("loss", [3.0, 2.0, 1.0]))
    record = example_record(description, 3, metrics={"loss": 1.0})
    registration = registry.register(record, uri="s3://bucket/x.json", manifest=encode(record))
    registry.set_alias(f"resume-{uid}", registration)
    registry.write_note("one attempt")
    registry.end_run("finished")


def in_child(task: Callable[[], None]) -> int:
    """Exit status of a fork that did `task`."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            task()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def main() -> None:
    uri, experiment, step = sys.argv[1:]
    kill_at = kill_at_request if uri.startswith("http") else kill_at_call
    with tempfile.TemporaryDirectory() as folder:
        # MLflow imports most of itself on first use: once here instead of in every fork.
        work(f"sqlite:///{folder}/warm.db", experiment, uuid.uuid4().hex)
    if uri.startswith("http"):
        MlflowClient(uri, registry_uri=uri)
    for request in range(1, _MOST, int(step)):
        uid = uuid.uuid4().hex

        def killed(request: int = request, uid: str = uid) -> None:
            kill_at(Countdown(request))
            work(uri, experiment, uid)

        status = in_child(killed)
        if status == 0:  # there is no n-th request
            return
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        assert in_child(lambda uid=uid: work(uri, experiment, uid)) == 0
        print(uid, flush=True)
    raise SystemExit(f"still not done after {_MOST} requests")


if __name__ == "__main__":
    main()
