"""What happens in an attempt, as typed records, and the log that carries them.

Each process of an attempt appends to a log file of its own; others follow it. A log is a file
because appending never blocks training, and what was appended survives the writer's SIGKILL.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from ckpt_tasks.replay import Replay
from ckpt_tasks.types import Number, Position, Trigger

__all__ = [
    "AttemptClaimed",
    "AttemptEnded",
    "AttemptResumed",
    "CheckpointCommitted",
    "CheckpointQuarantined",
    "CheckpointRegistered",
    "Event",
    "EventLog",
    "EventReader",
    "EventSink",
    "MetricsLogged",
    "MetricsReplayed",
    "OutputLine",
    "Progress",
    "RegistryLinked",
    "RegistryUnavailable",
    "RetentionApplied",
    "RunFoundComplete",
    "SaveAwaited",
    "SaveDelayed",
    "SaveFailed",
    "SaveStarted",
    "SavesRecovered",
    "Warned",
    "discard_event",
]

_MAX_UNWRITTEN = 16 * 1024 * 1024


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    """Base of all events. Tagged with the class's name."""


class AttemptClaimed(Event, frozen=True, kw_only=True, tag=True):
    """The process owns the run from now on, under this attempt's number."""

    run: str
    uid: str
    attempt: int
    invocation: str
    pid: int


class AttemptResumed(Event, frozen=True, kw_only=True, tag=True):
    """Where the attempt starts from; `checkpoint` is ``None`` at the beginning.

    `lost_steps` counts the steps that an earlier attempt is known to have done beyond it.
    """

    attempt: int
    checkpoint: str | None
    position: Position
    why: str
    lost_steps: int = 0


class RunFoundComplete(Event, frozen=True, kw_only=True, tag=True):
    """Nothing is left to train. `attempt` is the newest one; no new one was claimed."""

    run: str
    uid: str
    attempt: int


class CheckpointQuarantined(Event, frozen=True, kw_only=True, tag=True):
    """A damaged checkpoint was found and marked; an older one is tried."""

    checkpoint: str
    why: str


class Progress(Event, frozen=True, kw_only=True, tag=True):
    """How far training is; sent at most a few times a second. `epochs` is the total asked for."""

    position: Position
    epochs: int | None = None


class MetricsLogged(Event, frozen=True, kw_only=True, tag=True):
    """Values logged up to a boundary, as ``(key, value, step, time_ms)``; see `MetricRow`."""

    rows: list[tuple[str, Number, int, int]]


class SaveStarted(Event, frozen=True, kw_only=True, tag=True):
    """A save is under way."""

    checkpoint: str
    trigger: Trigger
    reason: str


class CheckpointCommitted(Event, frozen=True, kw_only=True, tag=True):
    """A checkpoint exists. `seconds` is what training waited for it, `drain` how long it was
    written, which training may have spent going on.
    """

    checkpoint: str
    position: Position
    trigger: Trigger
    reason: str
    size: int
    seconds: float
    drain: float = 0.0


class SaveDelayed(Event, frozen=True, kw_only=True, tag=True):
    """A save is due while another one, `behind`, is still being written.

    With `waits`, training waits for that one; else it goes on, and the schedule decides again
    at the first boundary behind it. Told once for each save that others wait for.
    """

    trigger: Trigger
    reason: str
    position: Position
    behind: str
    waits: bool


class SaveAwaited(Event, frozen=True, kw_only=True, tag=True):
    """Training stands still until `checkpoint` is written; told at growing intervals.

    `waited` and `left` in seconds, the latter until it is given up.
    """

    checkpoint: str
    waited: float
    left: float


class SaveFailed(Event, frozen=True, kw_only=True, tag=True):
    """A save did not become a checkpoint; training goes on. `unprotected` in seconds.

    `failures` counts those since the last that succeeded. `again` where people have been told of
    the same a short while ago. `no_space` where bytes that are removed could help.
    """

    run: str
    checkpoint: str
    why: str
    unprotected: float
    failures: int = 1
    again: bool = False
    no_space: bool = False


class SavesRecovered(Event, frozen=True, kw_only=True, tag=True):
    """`checkpoint` was saved, after `failures` saves had not been; `unprotected` in seconds."""

    checkpoint: str
    failures: int
    unprotected: float


class CheckpointRegistered(Event, frozen=True, kw_only=True, tag=True):
    """The registry knows a checkpoint."""

    checkpoint: str
    registered_model: str
    version: str
    model_id: str
    links: dict[str, str] = {}


class RegistryLinked(Event, frozen=True, kw_only=True, tag=True):
    """The registry's run is open; `links` are pages for people."""

    tracking_uri: str
    experiment_id: str
    run_id: str
    links: dict[str, str]


class RegistryUnavailable(Event, frozen=True, kw_only=True, tag=True):
    """The registry did not answer; `queued` requests wait for it.

    `again` where that was told before. `left` is for how many seconds more the end of the attempt
    waits; ``None`` while training goes on.
    """

    why: str
    queued: int
    again: bool = False
    left: float | None = None


class MetricsReplayed(Event, frozen=True, kw_only=True, tag=True):
    """Steps done again after a resume were compared with what had been logged first.

    Told once, when training has come further than any earlier attempt, or the attempt has ended.
    """

    run: str
    attempt: int
    replay: Replay


class RetentionApplied(Event, frozen=True, kw_only=True, tag=True):
    """Checkpoints are no longer kept (`expired`), or are gone, with so many bytes."""

    expired: list[str]
    removed: list[str] = []
    freed: int = 0


class Warned(Event, frozen=True, kw_only=True, tag=True):
    """Something the user should know."""

    message: str


class OutputLine(Event, frozen=True, kw_only=True, tag=True):
    """A line that the user's code printed."""

    text: str


class AttemptEnded(Event, frozen=True, kw_only=True, tag=True):
    """The attempt's outcome: an exit code of the command line, and one sentence."""

    attempt: int | None
    code: int
    message: str
    position: Position | None = None


AnyEvent = (
    AttemptClaimed
    | AttemptResumed
    | RunFoundComplete
    | CheckpointQuarantined
    | Progress
    | MetricsLogged
    | SaveStarted
    | CheckpointCommitted
    | SaveFailed
    | SavesRecovered
    | SaveDelayed
    | SaveAwaited
    | CheckpointRegistered
    | RegistryLinked
    | RegistryUnavailable
    | MetricsReplayed
    | RetentionApplied
    | Warned
    | OutputLine
    | AttemptEnded
)

EventSink = Callable[[Event], None]


def discard_event(event: Event) -> None:
    """A sink for callers that do not listen."""


class EventLog:
    """Appends events to a file; also an `EventSink`.

    Each record is one line of JSON written by a single ``write`` in append mode, so readers
    never see two records mixed, and at most the last one incomplete. What a full disk does not
    take is kept in memory and written before the next event: it must not end a training.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._encoder = msgspec.json.Encoder()
        self._lock = threading.Lock()
        self._unwritten = bytearray()

    def __call__(self, event: Event) -> None:
        line = self._encoder.encode(event) + b"\n"
        with self._lock:
            self._unwritten += line
            try:
                while self._unwritten:
                    del self._unwritten[: os.write(self._fd, self._unwritten)]
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
                if not full or len(self._unwritten) > _MAX_UNWRITTEN:
                    raise

    def close(self) -> None:
        os.close(self._fd)


class EventReader:
    """Follows an `EventLog`'s file from its beginning.

    Parameters
    ----------
    path
        The file; it need not exist yet.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._offset = 0
        self._decoder = msgspec.json.Decoder(AnyEvent)

    def read(self) -> Iterator[Event]:
        """Yield the complete events appended since the last call; returns when there are none."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        return
                    self._offset += len(line)
                    yield self._decoder.decode(line)
        except FileNotFoundError:
            return
