"""A live, readable account of an attempt: its events as lines, its progress on one line."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import IO

from ckpt_tasks import events
from ckpt_tasks.escaping import printable
from ckpt_tasks.masking import mask_text
from ckpt_tasks.tasks.narrate import narrate

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
        """Print `event`, unless people need not know; how the attempt ended is the caller's to
        say, who also knows of an end that was never reported.
        """
        if isinstance(event, events.Progress):
            self._progress(event)
            return
        if isinstance(event, events.OutputLine):
            self._pass_on(event.text)
            return
        described = None if isinstance(event, events.AttemptEnded) else narrate(event)
        if described is not None:
            level, text = described
            self._line(text if level <= logging.INFO else f"{logging.getLevelName(level)}: {text}")
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
        self._stream.write(f"{printable(mask_text(text))}\n")
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
