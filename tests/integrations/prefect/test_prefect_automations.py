from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.automations import Automation
from prefect.client.orchestration import get_client
from support.prefect_server import PrefectServer, free_port

from ckpt_tasks.errors import ConfigError
from ckpt_tasks.integrations.prefect.automations import CRASHED, HEARTBEAT, install_automations


def _ids() -> dict[str, list[str]]:
    with get_client(sync_client=True) as client:
        return {
            name: [str(found.id) for found in client.read_automations_by_name(name)]
            for name in (CRASHED, HEARTBEAT)
        }


@pytest.mark.usefixtures("prefect_api")
def test_installing_twice_leaves_one_automation_of_each_kind() -> None:
    """A second installation finds both automations, changes nothing and makes no double."""
    install_automations()
    first = _ids()

    again = install_automations()

    assert again == {CRASHED: "unchanged", HEARTBEAT: "unchanged"}
    assert _ids() == first
    assert all(len(ids) == 1 for ids in first.values())


@pytest.mark.usefixtures("prefect_api")
def test_installing_with_another_timeout_updates_in_place() -> None:
    """A changed heartbeat timeout reaches the existing automation, under its id."""
    install_automations()
    before = _ids()

    changed = install_automations(heartbeat_timeout=120)

    assert changed == {CRASHED: "unchanged", HEARTBEAT: "updated"}
    assert _ids() == before
    trigger = Automation.read(name=HEARTBEAT).trigger
    assert trigger.within.total_seconds() == 120


def test_timeout_shorter_than_a_heartbeat_is_refused() -> None:
    """A timeout that would crash healthy flow runs raises before anything is sent."""
    with pytest.raises(ConfigError, match="30 s"):
        install_automations(heartbeat_timeout=20)


def test_command_line_installs_them(prefect_api: PrefectServer, tmp_path: Path) -> None:
    """``ckpt-tasks prefect install-automations`` works on the server of PREFECT_API_URL."""
    printed = prefect_api.run_cli(
        "ckpt_tasks", "prefect", "install-automations", cwd=tmp_path, timeout=60
    )

    assert CRASHED in printed
    assert HEARTBEAT in printed
    assert all(len(ids) == 1 for ids in _ids().values())


def refused(folder: Path, **environment: str) -> str:
    """What the command prints, as it exits like any other whose server is away."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    done = subprocess.run(
        [sys.executable, "-m", "ckpt_tasks", "prefect", "install-automations"],
        env={**inherited, "PREFECT_HOME": str(folder), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == ""
    return f"{done.returncode} {done.stderr}"


def test_absent_server_is_named_with_what_to_do(tmp_path: Path) -> None:
    """Nobody listens at PREFECT_API_URL: one line with the URL, its password masked, exit 1."""
    port = free_port()

    printed = refused(tmp_path, PREFECT_API_URL=f"http://me:hush@127.0.0.1:{port}/api")

    assert printed.startswith("1 error: the Prefect server of PREFECT_API_URL = http://***@127.0")
    assert f":{port}/api does not answer" in printed
    assert "prefect server start" in printed
    assert "hush" not in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(("path", "answer"), [("", "with a page"), ("/api/v9", "404 Not Found")])
def test_server_that_refuses_is_named_with_what_to_check(
    prefect_api: PrefectServer, tmp_path: Path, path: str, answer: str
) -> None:
    """The URL of the pages, or a wrong one: what it answered, and what such a URL ends in."""
    url = prefect_api.ui_url + path

    printed = refused(tmp_path, PREFECT_API_URL=url)

    assert printed.startswith("1 error: the Prefect server of")
    assert f" = {url} answered {answer}: does the URL end in /api" in printed


def test_no_server_at_all_is_a_usage_error(tmp_path: Path) -> None:
    """Without a URL, and where Prefect may start no server of its own, exit 2 says what to set."""
    printed = refused(tmp_path, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE="false")

    assert printed.startswith("2 error: no Prefect server is named: set PREFECT_API_URL")
