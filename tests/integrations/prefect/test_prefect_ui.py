from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.browser import Browser
from support.prefect_runs import ServedToy, artifacts, wait_for_state
from support.prefect_server import PrefectServer

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
    done = wait_for_state(flow_run, "Completed", "Failed", "Crashed", log=toy.runner.log)
    assert done.state_name == "Completed", toy.runner.output()[-6000:]
    ui, found = prefect_api.ui_url, artifacts(flow_run)

    browser.open(f"{ui}/runs/flow-run/{flow_run}")
    browser.wait_for_text("Artifacts", "Finished in state")
    browser.screenshot(tmp_path / "flow-run.png")
    browser.click("Artifacts", selector=".p-tab")
    browser.wait_for_text("Checkpoints of training run", timeout=20)
    browser.screenshot(tmp_path / "flow-run-artifacts.png")

    for kind, texts in (
        ("checkpoints", ("step-00000032-a1-s", "committed")),
        ("report", ("Attempts", "the beginning")),
    ):
        browser.open(f"{ui}/artifacts/artifact/{found[kind][0].id}")
        browser.wait_for_text(*texts)
        browser.screenshot(tmp_path / f"{kind}.png")

    browser.open(f"{ui}/deployments/deployment/{toy.deployment()}/run")
    browser.wait_for_text("Learning rate of AdamW.", "resume")
    browser.screenshot(tmp_path / "form.png")
