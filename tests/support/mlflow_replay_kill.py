"""Publishes an attempt that replays steps and is killed on the way; a program for tests of MLflow.

As `mlflow_kill`: for every *step*-th request that publishing consists of, a first child publishes
an attempt that died, a second its successor until it ends itself just before that request, and a
third, the registrar in its place, all of the successor once more.

Usage: ``python mlflow_replay_kill.py TRACKING_URI EXPERIMENT STEP``. Prints, for each, the run's
uid and what the last registrar told of the replay.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path

from support.made_runs import MadeRun
from support.mlflow_kill import Countdown, in_child, kill_at_request

from ckpt_tasks.config import RegistryConfig
from ckpt_tasks.events import Event, MetricsReplayed, discard_event
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.integrations.mlflow import MlflowRegistry
from ckpt_tasks.registry import RunDescription, RunStatus
from ckpt_tasks.training.registration.publisher import Publisher
from ckpt_tasks.training.spec import AttemptFolder

_MOST = 200
FIRST, REPLAYED = 0.5, 0.75
DIED_AT, DONE = 6, 8
"""Steps that the first attempt had done, and the second; it resumes behind step 3."""


def rows(value: float, first: int, last: int, time_ms: int) -> list[tuple[str, float, int, int]]:
    """Of a metric that is always `value`, and of one that is the same in all attempts."""
    return [
        row
        for step in range(first, last + 1)
        for row in (("loss", value, step, time_ms + step), ("seen", 1.0, step, time_ms + step))
    ]


class Scene:
    """A run whose first attempt has died behind its checkpoint, and whose second goes on."""

    def __init__(self, uri: str, experiment: str) -> None:
        self.config = RegistryConfig(tracking_uri=uri, experiment=experiment)
        self.run = MadeRun(name="replayed")
        self.first = self.run.begin()
        self.saved = self.first.save(3, rows=rows(FIRST, 1, 3, 1000), metrics={"loss": FIRST})
        self.second = self.run.begin()

    def publish_first(self) -> None:
        """By the fence of the second, which has been claimed already."""
        publisher = self._publisher(None)
        publisher.add_rows(rows(FIRST, 1, DIED_AT, 1000))
        publisher.publish()

    def publish_second(self, folder: Path) -> None:
        """From the beginning, whatever a registrar before this one has done."""
        publisher = self._publisher(folder)
        publisher.add_rows(rows(REPLAYED, 4, 5, 2000))
        publisher.publish()
        publisher.add_rows(rows(REPLAYED, 6, DONE, 2000))
        publisher.publish()
        _end(publisher, "finished")

    def _publisher(self, folder: Path | None) -> Publisher:
        run = self.run
        bounds = AttemptFolder(folder).keep_metric_bounds if folder is not None else dict
        return Publisher(
            run.store,
            run.layout,
            Fence(run.store, run.layout, self.second.number),
            MlflowRegistry(self.config),
            self.config,
            RunDescription(
                run=run.name, uid=run.identity.uid, store_url="memory:", hyperparameters={}
            ),
            _tell if folder is not None else discard_event,
            bounds=bounds,
        )


def _tell(event: Event) -> None:
    if isinstance(event, MetricsReplayed):
        print(event.replay, flush=True)


def _end(publisher: Publisher, status: RunStatus) -> None:
    publisher.settle(status)
    publisher.publish()
    publisher.end(status)


def main() -> None:
    uri, experiment, step = sys.argv[1:]
    with tempfile.TemporaryDirectory() as warm:
        # MLflow imports most of itself on first use: once here instead of in every fork.
        Scene(f"sqlite:///{warm}/warm.db", experiment).publish_first()
    for request in range(1, _MOST, int(step)):
        scene = Scene(uri, experiment)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            assert in_child(scene.publish_first) == 0

            def killed(request: int = request, scene: Scene = scene, folder: Path = folder) -> None:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                kill_at_request(Countdown(request))
                scene.publish_second(folder)

            status = in_child(killed)
            if status == 0:  # there is no n-th request
                return
            assert os.WTERMSIG(status) == signal.SIGKILL, status
            print(scene.run.identity.uid, flush=True)
            assert in_child(lambda s=scene, f=folder: s.publish_second(f)) == 0
    raise SystemExit(f"still not done after {_MOST} requests")


if __name__ == "__main__":
    main()
