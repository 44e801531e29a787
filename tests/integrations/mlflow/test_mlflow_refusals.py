"""A checkpoint that MLflow refuses is told from an MLflow that is away, and blocks no other."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec
import pytest
from mlflow import MlflowClient
from support.made_runs import MadeAttempt, MadeRun

from ckpt_tasks.config import RegistryConfig
from ckpt_tasks.errors import RegistryError, RegistryRefusedError
from ckpt_tasks.events import CheckpointRegistered, Event, Warned
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.format.codec import encode
from ckpt_tasks.integrations.mlflow import MlflowRegistry
from ckpt_tasks.registry import RunDescription
from ckpt_tasks.training.registration.publisher import Publisher
from ckpt_tasks.types import CheckpointId

EXPERIMENT = "refusals"


def described(run: MadeRun) -> RunDescription:
    return RunDescription(
        run=run.name, uid=run.identity.uid, store_url=run.store.url, hyperparameters={}
    )


def publisher(run: MadeRun, attempt: MadeAttempt, uri: str, events: list[Event]) -> Publisher:
    config = RegistryConfig(tracking_uri=uri, experiment=EXPERIMENT)
    fence = Fence(run.store, run.layout, attempt.number)
    registry = MlflowRegistry(config)
    return Publisher(run.store, run.layout, fence, registry, config, described(run), events.append)


def date_back(run: MadeRun, checkpoint: CheckpointId) -> None:
    """As a machine writes it whose clock stands before 1970: MLflow takes no negative time."""
    record = msgspec.structs.replace(run.record(checkpoint), created_at="1969-07-20T20:17:40.000Z")
    run.store.put(run.layout.commit(checkpoint), encode(record))


@pytest.mark.parametrize("kind", ["database", "server"])
def test_refused_checkpoint(kind: str, sqlite_uri: str, request: pytest.FixtureRequest) -> None:
    """What MLflow itself refuses of one checkpoint sets that one aside, with MLflow's reason;
    those behind it get their versions, and it gets none.
    """
    uri = sqlite_uri if kind == "database" else request.getfixturevalue("mlflow_server").uri
    run = MadeRun(name=f"refused-{kind}")
    attempt = run.begin()
    saved = [attempt.save(1), attempt.save(2), attempt.save(3)]
    date_back(run, saved[1])
    events: list[Event] = []
    publishing = publisher(run, attempt, uri, events)
    for _ in range(2):
        with pytest.raises(RegistryRefusedError, match="nonnegative"):
            publishing.publish()
    publishing.publish()
    publishing.end("finished")
    told = [event.checkpoint for event in events if isinstance(event, CheckpointRegistered)]
    assert told == [str(saved[0]), str(saved[2])]
    (warned,) = [event.message for event in events if isinstance(event, Warned)]
    assert warned.startswith(f"{saved[1]} is set aside")
    assert "nonnegative" in warned
    again = publisher(run, attempt, uri, events)
    with pytest.raises(RegistryRefusedError):
        again.publish()
    client = MlflowClient(uri, registry_uri=uri)
    versions = client.search_model_versions(f"tags.`ckpt.run` = '{run.name}'")
    assert sorted(version.tags["ckpt.step"] for version in versions) == ["1", "3"]


@contextmanager
def answering(status: int) -> Iterator[str]:
    """A server that gives every request the same page of text; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_any(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"page")

        do_GET = do_POST = do_any  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            """Keep the tests' output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
def test_an_answer_that_is_about_no_checkpoint(status: int) -> None:
    """Without permission, another server's page in MLflow's place, an overloaded or a failing
    server: outages, during which everything waits.
    """
    run = MadeRun()
    with answering(status) as uri, pytest.raises(RegistryError) as outage:
        publisher(run, run.begin(), uri, []).publish()
    assert type(outage.value) is RegistryError


def test_a_server_that_is_away_refuses_nothing() -> None:
    """A refused connection is an outage too."""
    run = MadeRun()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(RegistryError) as outage:
            publisher(run, run.begin(), uri, []).publish()
    assert type(outage.value) is RegistryError
