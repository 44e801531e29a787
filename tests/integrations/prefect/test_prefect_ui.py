from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.browser import Browser
from support.mlflow_server import MlflowServer
from support.prefect_runs import ServedToy, artifacts, wait_for_state
from support.prefect_server import PrefectServer

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "chromium", size=(1500, 1400)) as opened:
        yield opened


@pytest.fixture
def toy(
    prefect_api: PrefectServer, mlflow_server: MlflowServer, tmp_path: Path
) -> Iterator[ServedToy]:
    served = ServedToy(
        prefect_api,
        tmp_path,
        tmp_path.name,
        TOY_STEP_SECONDS="0.05",
        TOY_MLFLOW=mlflow_server.uri,
        TOY_EXPERIMENT="shown",
    )
    yield served
    served.runner.close()


def link_saying(browser: Browser, text: str) -> str:
    """Where the link of this text leads."""
    found = browser.evaluate(
        f"[...document.querySelectorAll('a')].find(a => a.innerText === {json.dumps(text)})?.href"
    )
    assert found, browser.text()
    return str(found)


def test_ui_shows_form_and_artifacts(
    toy: ServedToy, prefect_api: PrefectServer, browser: Browser, tmp_path: Path
) -> None:
    """People see the form's hyperparameters, and a run's progress, checkpoints, link and report.

    The link leads to the training run's page in MLflow.
    """
    flow_run = toy.trigger()
    done = wait_for_state(flow_run, "Completed", "Failed", "Crashed", log=toy.runner.log)
    assert done.state_name == "Completed", toy.runner.output()[-6000:]
    ui, found, run = prefect_api.ui_url, artifacts(flow_run), f"toy-{flow_run}"

    browser.open(f"{ui}/runs/flow-run/{flow_run}")
    browser.wait_for_text("Artifacts", "Finished in state")
    browser.screenshot(tmp_path / "flow-run.png")
    browser.click("Artifacts", selector=".p-tab")
    # A card has room for one line, and cuts it off before the run's name.
    cards = {
        "progress": "100 %, step 32, epoch 4 of 4: ",
        "checkpoints": "11 checkpoint(s), newest first: ",
        "registry": "Links to the registry: ",
        "report": "What happened in ",
    }
    browser.wait_for_text(*cards.values(), timeout=20)
    for kind, line in cards.items():
        assert str(found[kind][0].description).startswith(line)
    browser.screenshot(tmp_path / "flow-run-artifacts.png")

    for kind, texts in (
        ("progress", ("Progress: 100%", "step 32, epoch 4 of 4", run)),
        ("checkpoints", ("step-00000032-a1-s", "registered: shown v")),
        ("report", ("Attempts", "the beginning")),
        ("registry", ("MLflow: run",)),
    ):
        browser.open(f"{ui}/artifacts/artifact/{found[kind][0].id}")
        browser.wait_for_text(*texts)
        browser.screenshot(tmp_path / f"{kind}.png")

    browser.open(link_saying(browser, "MLflow: run"))
    browser.wait_for_text(run, "Finished", "Metrics")
    browser.screenshot(tmp_path / "mlflow.png")

    browser.open(f"{ui}/deployments/deployment/{toy.deployment()}/run")
    browser.wait_for_text("Learning rate of AdamW.", "resume")
    browser.screenshot(tmp_path / "form.png")
