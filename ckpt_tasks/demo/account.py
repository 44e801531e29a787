"""The demo's live account: who does what, and when."""

from __future__ import annotations

import re
import threading
import time

__all__ = ["Account"]

_CHECKPOINT = re.compile(r"^(saved|registered) step-\d+-a\d+-s\d+")


class Account:
    """Prints lines as things happen, from any thread. Times are seconds since its making."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._counts = {"saved": 0, "registered": 0}

    @property
    def registered(self) -> int:
        """How many registered checkpoints were relayed."""
        return self._counts["registered"]

    def heading(self, text: str) -> None:
        with self._lock:
            print(f"\n{text}", flush=True)

    def say(self, who: str, text: str) -> None:
        seconds = time.monotonic() - self._started
        with self._lock:
            print(f"  {seconds:6.1f}s  {who:<9} {text}".rstrip(), flush=True)

    def relay(self, who: str, text: str) -> None:
        """Say what a task has logged; checkpoints are counted, and told of with each epoch."""
        checkpoint = _CHECKPOINT.match(text)
        if checkpoint:
            self._counts[checkpoint[1]] += 1
        elif text.startswith("epoch") and "accuracy" in text:
            counts = f"{self._counts['saved']} checkpoints, {self.registered} registered"
            self.say(who, f"{text}   ({counts})")
        else:
            self.say(who, text)
