from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.browser import Browser
from support.prefect_runs import ServedToy, wait_for_state
from support.prefect_server import PrefectServer

from ckpt_tasks.integrations.prefect.artifacts import artifact_key

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "chromium", size=(1500, 1100)) as opened:
        yield opened


@pytest.fixture
def toy(prefect_api: PrefectServer, tmp_path: Path) -> Iterator[ServedToy]:
    served = ServedToy(prefect_api, tmp_path, tmp_path.name, TOY_STEP_SECONDS="0.05", TOY_MLFLOW="")
    yield served
    served.runner.close()


def test_ui_shows_form_and_artifacts(
    toy: ServedToy, prefect_api: PrefectServer, browser: Browser, tmp_path: Path
) -> None:
    """People see the hyperparameters in the run form, and a run's checkpoints and report."""
    flow_run = toy.trigger()
    wait_for_state(flow_run, "Completed", "Failed", "Crashed", log=toy.runner.log)
    ui = prefect_api.ui_url

    browser.open(f"{ui}/runs/flow-run/{flow_run}?tab=Artifacts")
    browser.wait_for_text("Artifacts")
    browser.screenshot(tmp_path / "flow-run-artifacts.png")

    browser.open(f"{ui}/artifacts/key/{artifact_key('checkpoints', f'toy-{flow_run}')}")
    browser.wait_for_text("step-00000032-a1-s")
    browser.screenshot(tmp_path / "checkpoints.png")

    browser.open(f"{ui}/artifacts/key/{artifact_key('report', f'toy-{flow_run}')}")
    browser.wait_for_text("Attempts", "the beginning")
    browser.screenshot(tmp_path / "report.png")

    browser.open(f"{ui}/deployments/deployment/{toy.deployment()}/run")
    browser.wait_for_text("Learning rate of AdamW.", "resume")
    browser.screenshot(tmp_path / "form.png")
