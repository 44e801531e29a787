"""The digits classifier as a Prefect flow, killed on its way."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import IO

from ckpt_tasks.demo.account import Account
from ckpt_tasks.demo.prefect_server import prefect_environment, prefect_server
from ckpt_tasks.demo.stage import RUN, Stage
from ckpt_tasks.errors import CkptTasksError

__all__ = ["WithPrefect"]

_LOG_LINE = re.compile(r"^[\d:.]+ \| \w+\s+\| (Task|Flow) run '([^']+)' - (.*)$")
_RETRY = re.compile(r"^Task run failed .*?\(['\"](.*)['\"]\) - (Retry .*)$")
_NOISE = ("Created task", "Beginning", "Executing", "Finished in state Completed")


class WithPrefect:
    """Runs the flow in a process of its own, against a server of its own."""

    title = "a Prefect flow"

    @contextlib.contextmanager
    def show(self, stage: Stage) -> Iterator[list[int]]:
        """Run it to its end; yields the numbers of the killed attempts."""
        home = stage.folder / "prefect"
        with prefect_server(home) as api:
            stage.account.say("prefect", f"server is up: {api}")
            environment = prefect_environment(home) | {"PREFECT_API_URL": api}
            with stage.killing() as killed:
                _run_flow(stage, environment)
            yield killed

    def where_to_look(self, stage: Stage) -> str:
        return f"Prefect:  PREFECT_HOME={stage.folder / 'prefect'} prefect server start"


def _run_flow(stage: Stage, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "ckpt_tasks.demo.flow"]
    flow = subprocess.Popen(
        [*command, stage.store_url, stage.tracking_uri, RUN],
        env=environment,
        cwd=stage.folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log = stage.folder / "flow.log"
    try:
        assert flow.stdout is not None
        with log.open("w", encoding="utf-8") as copy:
            _relay(flow.stdout, copy, stage.account)
        code = flow.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            flow.terminate()
        flow.wait()
    if code != 0:
        raise CkptTasksError(f"the flow failed; see {log}")


def _relay(output: IO[str], copy: IO[str], account: Account) -> None:
    for line in output:
        copy.write(line)
        match = _LOG_LINE.match(line)
        if match is None or match[3].startswith(_NOISE):
            continue
        who = "flow" if match[1] == "Flow" else match[2].rpartition("-")[0]
        retry = _RETRY.match(match[3])
        for text in retry.groups() if retry else (match[3],):
            account.relay(who, text)
