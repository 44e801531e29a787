"""MLflow's web pages, in a real browser, show what a researcher looks for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.browser import Browser
from support.mlflow_server import MlflowServer

from ckpt_tasks.config import RegistryConfig
from ckpt_tasks.format.codec import encode
from ckpt_tasks.integrations.mlflow import MlflowRegistry
from ckpt_tasks.testing.registry import example_description, example_record, rows_of
from ckpt_tasks.types import Position

QUERY = "?workflowType=machine_learning"


@dataclass(frozen=True)
class Pages:
    """What the fixture registered, and where its pages are."""

    run: str
    alias: str
    links: dict[str, str]


@pytest.fixture(scope="module")
def pages(mlflow_server: MlflowServer) -> Pages:
    """Three checkpoints of a finished run, the last one to resume from, the second the best."""
    description = example_description(
        run="digits", hyperparameters={"lr": 0.00075, "batch_size": 48, "optimizer": "adamw"}
    )
    registry = MlflowRegistry(
        RegistryConfig(tracking_uri=mlflow_server.uri, experiment="digits in the browser")
    )
    registry.open_run(registry.create_run(description), description)
    registry.log_metrics(rows_of("loss", [1 / step for step in range(1, 301)]))
    for epoch, step in enumerate((100, 200, 300)):
        record = example_record(
            description,
            step,
            position=Position(epoch=epoch, step=step, phase="epoch_done"),
            metrics={"loss": 1 / step},
            trigger="epoch",
            reason="every epoch",
        )
        uri = f"s3://bucket/checkpoints/digits/commits/{record.id}.json"
        last = registry.register(record, uri=uri, manifest=encode(record))
        registry.set_alias("resume-digits", last)
        if step == 200:
            registry.set_alias("best", last)
    registry.write_note(
        "**Attempt 1** was killed at step 250.\n\n"
        "**Attempt 2** went on from [step 200](https://example.org/step-200)."
    )
    registry.end_run("finished")
    return Pages(run="digits", alias="resume-digits", links=registry.links(last))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser"), size=(1800, 1300)) as browser:
        yield browser


def test_run_page(browser: Browser, pages: Pages, tmp_path: Path) -> None:
    """The run's page shows status, hyperparameters, metrics, the note with a link that works,
    the registered versions, and the checkpoints with their steps.
    """
    browser.open(pages.links["run"])
    shown = browser.wait_for_text("Finished", "batch_size", "0.00075", "ckpt/bytes", "step 200")
    assert "Attempt 1 was killed at step 250." in shown
    assert "digits in the browser" in shown
    assert "ckpt-tasks: begin" not in shown
    links = "[...document.querySelectorAll('a')].map(a => a.href)"
    assert "https://example.org/step-200" in browser.evaluate(links)
    browser.wait_for_text("Logged models (3)", "step-00000300")
    browser.screenshot(tmp_path / "run.png")


def test_logged_model_page(browser: Browser, pages: Pages, tmp_path: Path) -> None:
    """A checkpoint's page shows epoch, step, size, digest, URI, hyperparameters and metrics."""
    browser.open(pages.links["model"])
    shown = browser.wait_for_text("Parameters (", "committed_at", "ckpt/epoch")
    lines = shown.splitlines()
    for name, value in {
        "epoch": "2",
        "step": "300",
        "size": "3.41 MB",
        "trigger": "epoch",
        "lr": "0.00075",
        "batch_size": "48",
        "uri": "s3://bucket/checkpoints/digits/commits/step-00000300-a1-s1.json",
        "checkpoint": "step-00000300-a1-s1",
    }.items():
        at = [number for number, line in enumerate(lines) if line.strip() == name]
        assert any(lines[number + 1].strip() == value for number in at), (name, shown)
    assert "Ready" in shown
    assert "3.41 MB, step 300 (end of epoch 2), of digits" in shown
    browser.screenshot(tmp_path / "model.png")


def test_models_tab(browser: Browser, pages: Pages, tmp_path: Path) -> None:
    """The experiment's Models tab lists the checkpoints with run and version."""
    experiment = pages.links["run"].partition("/runs/")[0]
    browser.open(f"{experiment}/models{QUERY}")
    shown = browser.wait_for_text("step-00000100", "step-00000200", "step-00000300", "v3")
    assert shown.count("Ready") == 3
    browser.screenshot(tmp_path / "models.png")


def test_registered_model_page(browser: Browser, pages: Pages, tmp_path: Path) -> None:
    """The table of versions shows run, epoch, step, trigger and hyperparameters in this order,
    the size first in the description, and the aliases.
    """
    model = pages.links["version"].partition("/versions/")[0]
    browser.open(f"{model}{QUERY}")
    shown = browser.wait_for_text("@ best", f"@ {pages.alias}", "ckpt.epoch", "3.41 MB")
    row = shown[shown.index("Version 3") : shown.index("Version 2")]
    chips = [
        "ckpt.run: digits",
        "ckpt.epoch: 2",
        "ckpt.step: 300",
        "ckpt.trigger: epoch",
        "hparam.lr: 0.00075",
        "hparam.batch_size: 48",
        "hparam.optimizer: adamw",
    ]
    text = " ".join(row.split()).replace(" :", ":")
    assert sorted(text.index(chip) for chip in chips) == [text.index(chip) for chip in chips]
    assert f"@ {pages.alias}" in row
    browser.screenshot(tmp_path / "registered.png")


def test_version_page(browser: Browser, pages: Pages, tmp_path: Path) -> None:
    """A version's page shows its alias, leads to run and logged model, and describes the
    checkpoint: position, size, time, reason, digest, URI, metrics and hyperparameters.
    """
    browser.open(pages.links["version"])
    shown = browser.wait_for_text("Version 3", f"@ {pages.alias}", "step-00000300", "Hyperparam")
    for part in (
        "3.41 MB, step 300 (end of epoch 2), of digits",
        "Size: 3.41 MB (3,412,345 bytes)",
        "Committed: 2026-11-21T10:05:03.123Z",
        "Why: every epoch",
        "Manifest: s3://bucket/checkpoints/digits/commits/step-00000300-a1-s1.json",
        "loss: 0.00333333",
        "lr: 0.00075",
        "batch_size: 48",
    ):
        assert part in shown
    browser.screenshot(tmp_path / "version.png")
