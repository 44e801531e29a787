from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.airflow_runs import Airflow, DagRun
from support.browser import Browser

pytestmark = pytest.mark.timeout(600)  # the first one starts Airflow and MLflow


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "chromium", size=(1500, 1100)) as opened:
        yield opened


def test_ui_shows_each_step_of_a_run(
    airflow: Airflow, killed: DagRun, browser: Browser, tmp_path: Path
) -> None:
    """People see the steps as tasks that succeeded, and how often training was tried."""
    browser.open(airflow.api.run_page("toy", killed.run_id))
    steps = ("resolve", "recover", "train", "verify", "promote", "report")
    browser.wait_for_text("6 Task Instances", "TrainOperator", *steps)
    browser.screenshot(tmp_path / "run.png")


def test_ui_shows_what_killed_a_try_and_what_the_next_resumed_from(
    airflow: Airflow, killed: DagRun, browser: Browser, tmp_path: Path
) -> None:
    """Each try's log tells its part: progress, checkpoints, the death, the resumption."""
    task = f"{airflow.api.run_page('toy', killed.run_id)}/tasks/train"
    browser.open(f"{task}?try_number=1")
    browser.wait_for_text(
        "attempt 1 starts from the beginning",
        "epoch 1 of 4, step",
        "as toy version",
        "the trainer was killed by SIGKILL",
    )
    browser.screenshot(tmp_path / "first-try.png")
    browser.open(f"{task}?try_number=2")
    browser.wait_for_text("attempt 2 resumed from step-", "of 4, step", "trained to its end")
    browser.screenshot(tmp_path / "second-try.png")
    browser.open(f"{task}/details")
    browser.wait_for_text("Extra Links", "MLflow run")
    browser.screenshot(tmp_path / "links.png")


def test_buttons_lead_to_pages_of_mlflow(killed: DagRun, browser: Browser, tmp_path: Path) -> None:
    """The run, with its metrics; and the version, with what it is."""
    links, newest = killed.links(), killed.view().newest
    assert newest is not None
    browser.open(str(links["MLflow run"]))
    browser.wait_for_text(killed.run, "loss")
    browser.screenshot(tmp_path / "mlflow-run.png")
    browser.open(str(links["MLflow model version"]))
    browser.wait_for_text("Version", newest.id)
    browser.screenshot(tmp_path / "mlflow-version.png")


def test_ui_has_a_field_for_each_kind_of_hyperparameter(
    airflow: Airflow, browser: Browser, tmp_path: Path
) -> None:
    """Text, number, switch, choice, list; what may be left out is not required."""
    browser.open(f"{airflow.api.url}/dags/form")
    browser.wait_for_text("Trigger")
    browser.click("Trigger")
    browser.wait_for_text(
        "What the model is called.",
        "Learning rate.",
        "Use mixed precision.",
        "Which loss is minimised.",
        "Hidden units of each layer.",
        "Largest norm of the gradients.",
    )
    form = browser.wait_for_text("This field is required")
    browser.screenshot(tmp_path / "kinds.png")
    fields = "[...document.querySelectorAll('[role=dialog] input')].map(e => e.type)"
    assert {"text", "checkbox"} <= set(browser.evaluate(fields))
    assert form.count("This field is required") == 1  # the one without a default


def test_ui_asks_for_the_hyperparameters(
    airflow: Airflow, browser: Browser, tmp_path: Path
) -> None:
    """The trigger form has a field for each, with its description and default."""
    browser.open(f"{airflow.api.url}/dags/toy")
    browser.wait_for_text("Trigger")
    browser.click("Trigger")
    browser.wait_for_text(
        "Learning rate of AdamW.",
        "Passes over the data, 8 steps each.",
        "Retries always go on from the newest.",
    )
    fields = "[...document.querySelectorAll('[role=dialog] input')].map(e => e.value)"
    assert {"0.01", "4", "auto"} <= set(browser.evaluate(fields))
    browser.screenshot(tmp_path / "form.png")
