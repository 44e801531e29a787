"""The digits classifier as a Prefect flow, killed on its way."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping

from ckpt_tasks.demo import viewer
from ckpt_tasks.demo.account import Account
from ckpt_tasks.demo.prefect_server import prefect_environment, prefect_server
from ckpt_tasks.demo.processes import Server, end_servers
from ckpt_tasks.demo.stage import RUN, Stage
from ckpt_tasks.demo.watcher import Watcher
from ckpt_tasks.errors import CkptTasksError

__all__ = ["WithPrefect"]

_LOG_LINE = re.compile(r"^[\d:.]+ \| \w+\s+\| (Task|Flow) run '([^']+)' - (.*)$")
_RETRY = re.compile(r"^Task run failed .*?\(['\"](.*)['\"]\) - (Retry .*)$")
# The page that it says to view is gone in a minute.
_NOISE = ("Created task", "Beginning", "Executing", "Finished in state Completed", "View at")
_POLL_SECONDS = 0.1
_END_SECONDS = 15.0


class WithPrefect:
    """Runs the flow in a process of its own, against a server of its own."""

    name = "Prefect"
    title = "a Prefect flow"
    options: tuple[str, ...] = ()
    home = "prefect"

    @contextlib.contextmanager
    def show(self, stage: Stage) -> Iterator[list[int]]:
        """Run it to its end; yields the numbers of the killed attempts."""
        home = stage.folder / self.home
        with Watcher() as watcher, prefect_server(home, watcher) as url:
            stage.account.say("prefect", f"server is up, until the end of the demo: {url}")
            environment = prefect_environment(home) | {"PREFECT_API_URL": f"{url}/api"}
            with stage.killing() as killed:
                _run_flow(stage, environment, watcher)
            yield killed

    def look(self, stage: Stage) -> None:
        """Start its server again, until its pages have been seen."""
        with Watcher() as watcher, prefect_server(stage.folder / self.home, watcher) as url:
            stage.account.say("prefect", f"server is up: {url}; Ctrl-C ends it")
            viewer.wait_until_seen()


def _run_flow(stage: Stage, environment: Mapping[str, str], watcher: Watcher) -> None:
    flow = Server(
        *("ckpt_tasks.demo.flow", stage.store_url, stage.tracking_uri, RUN),
        environment=environment,
        log=stage.folder / "flow.log",
        watcher=watcher,
    )
    try:
        for line in _lines(flow):
            _relay(line, stage.account)
    finally:
        end_servers(flow, grace=_END_SECONDS)
    if flow.process.returncode != 0:
        raise CkptTasksError(f"the flow failed; see {flow.log}")


def _lines(flow: Server) -> Iterator[str]:
    """What it prints, line by line, until its end."""
    line = ""
    with flow.log.open(encoding="utf-8", errors="replace") as log:
        running = True
        while running:
            running = flow.running  # before its log is read: what it said last is still read
            while part := log.readline():
                line += part
                if line.endswith("\n"):
                    yield line
                    line = ""
            time.sleep(_POLL_SECONDS)


def _relay(line: str, account: Account) -> None:
    match = _LOG_LINE.match(line)
    if match is None or match[3].startswith(_NOISE):
        return
    who = "flow" if match[1] == "Flow" else match[2].rpartition("-")[0]
    retry = _RETRY.match(match[3])
    for text in retry.groups() if retry else (match[3],):
        account.relay(who, text)
