"""A live, readable account of an attempt: its events as lines, its progress on one line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import IO, Any

from ckpt_tasks import events
from ckpt_tasks.cli.tables import age, mebibytes
from ckpt_tasks.masking import mask_text

__all__ = ["Account"]

_PLAIN_PROGRESS_INTERVAL = 10.0


class Account:
    """Prints what happens in an attempt; an `EventSink`.

    On a terminal, progress overwrites one line; elsewhere it is a line every ten seconds, so
    that logs stay short.

    Parameters
    ----------
    stream
        Where to print; default: standard error.
    output
        Where the user's own output goes; default: standard output.
    clock
        Seconds, monotonic.
    """

    def __init__(
        self,
        stream: IO[str] | None = None,
        *,
        output: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream or sys.stderr
        self._output = output or sys.stdout
        self._clock = clock
        self._live = self._stream.isatty()
        self._open_line = False
        self._last_progress: float | None = None
        self._shown_links: set[str] = set()

    def __call__(self, event: events.Event) -> None:
        """Print `event`, unless people need not know."""
        if isinstance(event, events.Progress):
            self._progress(event)
            return
        if isinstance(event, events.OutputLine):
            self._pass_on(event.text)
            return
        text = _describe(event)
        if text is not None:
            self._line(text)
        if isinstance(event, events.RegistryLinked | events.CheckpointRegistered):
            self._links(event.links)

    def close(self) -> None:
        """End the progress line."""
        if self._open_line:
            self._stream.write("\n")
            self._stream.flush()
            self._open_line = False

    def _line(self, text: str) -> None:
        self._clear()
        self._stream.write(f"{mask_text(text)}\n")
        self._stream.flush()

    def _pass_on(self, text: str) -> None:
        self._clear()
        self._output.write(f"{text}\n")
        self._output.flush()

    def _clear(self) -> None:
        if self._open_line:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._open_line = False

    def _progress(self, event: events.Progress) -> None:
        of = f" of {event.epochs}" if event.epochs is not None else ""
        text = f"epoch {event.position.epoch + 1}{of}, step {event.position.step}"
        if self._live:
            self._stream.write(f"\r\x1b[K  {text}")
            self._stream.flush()
            self._open_line = True
            return
        now = self._clock()
        if self._last_progress is None or now - self._last_progress >= _PLAIN_PROGRESS_INTERVAL:
            self._last_progress = now
            self._line(f"  {text}")

    def _links(self, links: dict[str, str]) -> None:
        """Each kind of page once: the newest version is found from the run's page."""
        for name, url in links.items():
            if name not in self._shown_links:
                self._shown_links.add(name)
                self._line(f"  {name}: {url}")


def _claimed(event: events.AttemptClaimed) -> str:
    return f"attempt {event.attempt} of {event.run!r} (pid {event.pid})"


def _resumed(event: events.AttemptResumed) -> str:
    if event.checkpoint is None:
        return f"starts from the beginning: {event.why}"
    lost = f", lost {event.lost_steps} steps" if event.lost_steps else ""
    return f"resumed from {event.checkpoint}, {event.position}{lost}: {event.why}"


def _committed(event: events.CheckpointCommitted) -> str:
    return (
        f"saved {event.checkpoint}, {mebibytes(event.size)}, waited {event.seconds:.2f} s "
        f"({event.trigger}: {event.reason})"
    )


def _save_failed(event: events.SaveFailed) -> str:
    return (
        f"WARNING: save of {event.checkpoint} failed, {age(event.unprotected)} without a "
        f"checkpoint: {event.why}"
    )


def _registered(event: events.CheckpointRegistered) -> str:
    return f"registered {event.checkpoint} as {event.registered_model} version {event.version}"


def _replayed(event: events.MetricsReplayed) -> str | None:
    if not event.diverged:
        return None
    return (
        f"WARNING: {event.diverged} of {event.compared} metric values differ from those of the "
        f"earlier attempt at the same step ({', '.join(event.keys)})"
    )


_DESCRIPTIONS: dict[type[events.Event], Callable[[Any], str | None]] = {
    events.AttemptClaimed: _claimed,
    events.AttemptResumed: _resumed,
    events.CheckpointCommitted: _committed,
    events.CheckpointQuarantined: lambda event: (
        f"WARNING: {event.checkpoint} is damaged and was quarantined: {event.why}"
    ),
    events.CheckpointRegistered: _registered,
    events.MetricsReplayed: _replayed,
    events.RegistryLinked: lambda event: f"registry: {event.tracking_uri}",
    events.RegistryUnavailable: lambda event: (
        f"WARNING: the registry does not answer, {event.queued} requests wait: {event.why}"
    ),
    events.SaveFailed: _save_failed,
    events.Warned: lambda event: f"WARNING: {event.message}",
}


def _describe(event: events.Event) -> str | None:
    describe = _DESCRIPTIONS.get(type(event))
    return describe(event) if describe else None
