"""A headless Chromium for tests that look at a web page as people do.

Driven through the DevTools protocol over a pipe: no driver program, no open port, no library.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)

_BETWEEN_PAGES = (
    "Inspected target navigated or closed",
    "Execution context was destroyed",
    "Cannot find default execution context",
)


def chromium_path() -> str:
    """Path of Chromium; without one the test is skipped, or fails where ``CI`` is set."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    message = "no Chromium found: install the package `chromium` to run the tests of web pages"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


class BrowserError(AssertionError):
    """The page did not become what the test waited for; says what it showed instead."""


class Browser:
    """One browser with one page.

    Parameters
    ----------
    profile
        Folder for the browser's own files; made if missing, best a fresh one.
    size
        Width and height of the window in pixels.
    """

    def __init__(self, profile: Path, *, size: tuple[int, int] = (1400, 1000)) -> None:
        self._ids = itertools.count(1)
        self._buffer = b""
        self._size = size
        self._page: str | None = None
        self._session: str | None = None
        self._process = self._start(profile)

    def _start(self, profile: Path) -> subprocess.Popen[bytes]:
        command_out, self._commands = os.pipe()
        self._replies, reply_in = os.pipe()
        # Chromium reads commands from descriptor 3 and answers on descriptor 4.
        redirect = f'exec "$0" "$@" 3<&{command_out} 4>&{reply_in}'
        profile.mkdir(parents=True, exist_ok=True)
        self._log = (profile / "chromium.log").open("wb")
        process = subprocess.Popen(
            ["bash", "-c", redirect, chromium_path(), *_FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(command_out, reply_in),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        os.close(command_out)
        os.close(reply_in)
        return process

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def open(self, url: str) -> None:
        """Load a page in a tab of its own; returns at once, so wait for what it should show.

        A tab that shows another page already may leave ``Page.navigate`` without an answer: its
        page can start a navigation of its own just then, which wins.
        """
        left = self._page
        self._session = None
        self._page = self._call("Target.createTarget", url=url)["targetId"]
        attached = self._call("Target.attachToTarget", targetId=self._page, flatten=True)
        if left is not None:
            self._call("Target.closeTarget", targetId=left)
        self._session = attached["sessionId"]
        width, height = self._size
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def text(self) -> str:
        """The text that a reader of the page sees, hidden parts left out; all spaces plain."""
        text = self.evaluate("document.body ? document.body.innerText : ''") or ""
        return text.replace("\N{NO-BREAK SPACE}", " ")

    def html(self) -> str:
        """The rendered DOM."""
        return str(self.evaluate("document.documentElement.outerHTML"))

    def wait_for_text(self, *texts: str, timeout: float = 90.0) -> str:
        """Wait until the page shows every one of `texts`; returns all it then shows.

        Raises
        ------
        BrowserError
            After `timeout` seconds; names what is missing and quotes the page.
        """
        deadline = time.monotonic() + timeout
        while True:
            shown = self.text()
            missing = [text for text in texts if text not in shown]
            if not missing:
                return shown
            if time.monotonic() > deadline:
                raise BrowserError(f"the page does not show {missing}; it shows:\n{shown}")
            time.sleep(0.1)

    def click(self, text: str, *, selector: str = "button, a, [role=tab], [role=button]") -> None:
        """Click the first element under `selector` whose text is `text`."""
        found = self.evaluate(
            f"(() => {{ const e = [...document.querySelectorAll({json.dumps(selector)})]"
            f".find(e => e.innerText.trim() === {json.dumps(text)}); "
            "if (!e) return false; e.scrollIntoView({block: 'center'}); e.click(); "
            "return true; })()"
        )
        if not found:
            raise BrowserError(f"nothing to click says {text!r}; the page shows:\n{self.text()}")

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression in the page; None while it is being replaced."""
        try:
            reply = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        except BrowserError as error:
            if any(reason in str(error) for reason in _BETWEEN_PAGES):
                return None
            raise
        if "exceptionDetails" in reply:
            raise BrowserError(f"{expression}: {reply['exceptionDetails']}")
        return reply["result"].get("value")

    def screenshot(self, path: Path) -> Path:
        """Write what the window shows as a PNG file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))
        return path

    def close(self) -> None:
        """End the browser and everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._commands)
        os.close(self._replies)
        self._log.close()

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        for reply in self._messages(method, timeout=60.0):
            if reply.get("id") == number:
                if "error" in reply:
                    raise BrowserError(f"{method}: {reply['error']}")
                return dict(reply["result"])
        raise BrowserError(f"{method}: the browser ended")

    def _messages(self, method: str, timeout: float) -> Iterator[dict[str, Any]]:
        deadline = time.monotonic() + timeout
        while True:
            raw, separator, rest = self._buffer.partition(b"\0")
            if separator:
                self._buffer = rest
                yield json.loads(raw)
                continue
            if not select.select([self._replies], [], [], max(0, deadline - time.monotonic()))[0]:
                raise BrowserError(f"{method}: no answer from the browser in {timeout:.0f} s")
            if not (data := os.read(self._replies, 1 << 20)):
                return
            self._buffer += data
