from __future__ import annotations

from pathlib import Path

import pytest
from prefect.automations import Automation
from prefect.client.orchestration import get_client
from support.prefect_server import PrefectServer

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
