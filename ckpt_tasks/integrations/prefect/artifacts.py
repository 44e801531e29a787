"""Artifacts of a training run: progress, checkpoints and registry link, each updated in place.

The server is called from a thread of its own, at most once every few seconds, so that a slow or
absent server delays neither the events nor the log lines of a training run.
"""

from __future__ import annotations

import contextvars
import hashlib
import json
import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
)
from prefect.client.schemas.objects import Artifact

from ckpt_tasks.events import (
    AttemptEnded,
    CheckpointCommitted,
    CheckpointQuarantined,
    CheckpointRegistered,
    Event,
    Progress,
    RegistryLinked,
)
from ckpt_tasks.masking import mask_url
from ckpt_tasks.tasks.report import Row, checkpoint_row
from ckpt_tasks.types import EXIT_DONE, Position

__all__ = ["ArtifactPublisher", "KeyedArtifact", "ProgressEstimate", "artifact_key"]

_INTERVAL = 2.0
_CLOSE_WITHIN = 30.0
_MAX_ROWS = 500


def artifact_key(kind: str, run: str) -> str:
    """Key of a run's artifact; one per run, within the characters that Prefect allows."""
    slug = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")[:60].strip("-")
    if slug != run:
        slug = f"{slug}-{hashlib.sha256(run.encode()).hexdigest()[:8]}".strip("-")
    return f"{kind}-{slug}"


class KeyedArtifact:
    """One artifact of one flow run, found again by key and then updated in place.

    Parameters
    ----------
    kind
        Prefect's type: ``progress``, ``table`` or ``markdown``.
    key
        From `artifact_key`.
    flow_run_id, task_run_id
        Where it is shown.
    """

    def __init__(self, kind: str, key: str, flow_run_id: UUID, task_run_id: UUID | None) -> None:
        self._kind = kind
        self._key = key
        self._flow_run_id = flow_run_id
        self._task_run_id = task_run_id
        self._id: UUID | None = None

    def read(self, client: SyncPrefectClient) -> Any:
        """Its data as the server has it, from an earlier execution too; ``None`` without."""
        found = self._find(client)
        self._id = found.id if found else None
        return found.data if found else None

    def publish(self, client: SyncPrefectClient, data: Any, description: str) -> None:
        """Create or update it. Raises ``httpx.HTTPError`` when the server does not take it."""
        if self._id is None:
            self.read(client)
        if self._id is not None and self._update(client, self._id, data, description):
            return
        created = client.create_artifact(
            ArtifactCreate(
                key=self._key,
                type=self._kind,
                description=description,
                data=data,
                flow_run_id=self._flow_run_id,
                task_run_id=self._task_run_id,
            )
        )
        self._id = created.id

    @staticmethod
    def _update(client: SyncPrefectClient, id_: UUID, data: Any, description: str) -> bool:
        """False where somebody has deleted it meanwhile."""
        try:
            client.update_artifact(id_, ArtifactUpdate(data=data, description=description))
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.NOT_FOUND:
                return False
            raise
        return True

    def _find(self, client: SyncPrefectClient) -> Artifact | None:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(
                key=ArtifactFilterKey(any_=[self._key]),
                flow_run_id=ArtifactFilterFlowRunId(any_=[self._flow_run_id]),
            ),
            limit=1,
        )
        return found[0] if found else None


class ArtifactPublisher:
    """An event sink that keeps a run's artifacts up to date until it is closed.

    Parameters
    ----------
    run
        The training run's name.
    flow_run_id, task_run_id
        Where the artifacts are shown.
    logger
        Told once when the server stops taking updates.
    rows
        Checkpoints of earlier attempts, newest first.
    """

    def __init__(
        self,
        run: str,
        flow_run_id: UUID,
        task_run_id: UUID | None,
        logger: logging.Logger | logging.LoggerAdapter[Any],
        rows: Iterable[Row] = (),
    ) -> None:
        self._run = run
        self._logger = logger
        self._rows = {str(row["checkpoint"]): row for row in reversed(list(rows))}
        self._progress = ProgressEstimate()
        self._link: RegistryLinked | None = None
        self._artifacts = {
            kind: KeyedArtifact(type_, artifact_key(kind, run), flow_run_id, task_run_id)
            for kind, type_ in (
                ("progress", "progress"),
                ("checkpoints", "table"),
                ("registry", "markdown"),
            )
        }
        self._lock = threading.Lock()
        self._changed: set[str] = {"progress"} | ({"checkpoints"} if self._rows else set())
        self._looked_back = False
        self._wake = threading.Event()
        self._wake.set()
        self._closing = threading.Event()
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._loop,), name="ckpt-tasks-artifacts", daemon=True
        )
        self._thread.start()

    def __call__(self, event: Event) -> None:
        """Take note of an event; returns at once."""
        with self._lock:
            what = self._note(event)
            if what is not None:
                self._changed.add(what)
                self._wake.set()

    def close(self) -> None:
        """Publish what is still to be published, and stop."""
        self._closing.set()
        self._wake.set()
        self._thread.join(_CLOSE_WITHIN)

    def _note(self, event: Event) -> str | None:
        match event:
            case Progress():
                self._progress.update(event.position, event.epochs)
                return "progress"
            case AttemptEnded() if event.code == EXIT_DONE:
                self._progress.finish()
                return "progress"
            case CheckpointCommitted():
                self._rows[event.checkpoint] = checkpoint_row(
                    event.checkpoint,
                    epoch=event.position.epoch,
                    trigger=event.trigger,
                    size=event.size,
                    state="committed",
                )
                return "checkpoints"
            case CheckpointRegistered():
                state = f"registered: {event.registered_model} v{event.version}"
                return self._set_state(event.checkpoint, state)
            case CheckpointQuarantined():
                return self._set_state(event.checkpoint, f"quarantined: {event.why}")
            case RegistryLinked():
                self._link = event
                return "registry"
            case _:
                return None

    def _set_state(self, checkpoint: str, state: str) -> str:
        row = self._rows.get(checkpoint) or checkpoint_row(
            checkpoint, epoch=None, trigger=None, size=None, state=state
        )
        self._rows[checkpoint] = {**row, "state": state}
        return "checkpoints"

    def _loop(self) -> None:
        healthy = True
        while True:
            self._wake.wait()
            closing = self._closing.is_set()
            self._wake.clear()
            problem = self._publish_changed()
            if problem is not None and healthy:
                self._logger.warning(
                    "artifacts cannot be updated (%s); training is not affected", problem
                )
            healthy = problem is None
            if closing:
                return
            if problem is not None:
                self._wake.set()
            self._closing.wait(_INTERVAL)

    def _publish_changed(self) -> str | None:
        """Send what has changed; on failure it stays marked, and the reason is returned."""
        with self._lock:
            changed, self._changed = self._changed, set()
        try:
            with get_client(sync_client=True) as client:
                self._look_back(client)
                for kind in sorted(changed):
                    with self._lock:
                        data, description = self._contents()[kind]()
                    self._artifacts[kind].publish(client, data, description)
        except httpx.HTTPError as error:
            with self._lock:
                self._changed |= changed
            return f"{type(error).__name__}: {error}"
        return None

    def _look_back(self, client: SyncPrefectClient) -> None:
        """Take over what an earlier try has shown of the registry: the store does not know it."""
        if self._looked_back:
            return
        earlier = self._artifacts["checkpoints"].read(client)
        self._looked_back = True
        for row in json.loads(earlier) if earlier else ():
            known = self._rows.get(row["checkpoint"])
            if known is not None and known["state"] == "committed":
                self._rows[row["checkpoint"]] = {**known, "state": row["state"]}

    def _contents(self) -> Mapping[str, Callable[[], tuple[Any, str]]]:
        # What changes stands first: the cards of a flow run's page show one line, without the data.
        return {
            "progress": lambda: (
                self._progress.percent,
                f"{self._progress.percent:g} %, {self._progress}: training run `{self._run}`",
            ),
            "checkpoints": lambda: (
                json.dumps(list(reversed(self._rows.values()))[:_MAX_ROWS]),
                f"{len(self._rows)} checkpoint(s), newest first: training run `{self._run}`",
            ),
            "registry": lambda: (
                _link_markdown(self._link),
                f"Links to the registry: training run `{self._run}`",
            ),
        }


class ProgressEstimate:
    """Percent done. Within an epoch it goes by the mean number of steps of the earlier ones."""

    def __init__(self) -> None:
        self.percent = 0.0
        self._position: Position | None = None
        self._epochs: int | None = None
        self._epoch_began = (0, 0)

    def update(self, position: Position, epochs: int | None) -> None:
        self._position, self._epochs = position, epochs
        done = position.epoch + (1 if position.phase == "epoch_done" else 0)
        if done != self._epoch_began[0]:
            self._epoch_began = (done, position.step)
        if not epochs:
            return
        fraction = float(done)
        if done > 0 and self._epoch_began[1] > 0:
            steps = self._epoch_began[1] / done
            fraction += min((position.step - self._epoch_began[1]) / steps, 0.99)
        self.percent = round(100 * min(fraction / epochs, 1.0), 1)

    def finish(self) -> None:
        self.percent = 100.0

    def __str__(self) -> str:
        if self._position is None:
            return "starting" if self.percent < 100 else "complete"
        of = f" of {self._epochs}" if self._epochs else ""
        return f"step {self._position.step}, epoch {self._position.epoch + 1}{of}"


def _link_markdown(link: RegistryLinked | None) -> str:
    if link is None:
        return ""
    pages = {name: url for name, url in link.links.items() if url.startswith(("http:", "https:"))}
    if pages:
        return "\n\n".join(f"[MLflow: {name}]({url})" for name, url in pages.items())
    uri = mask_url(link.tracking_uri)
    return (
        f"MLflow run `{link.run_id}` of experiment {link.experiment_id} in `{uri}`. "
        f"To look at it: `mlflow ui --backend-store-uri {uri}`"
    )
