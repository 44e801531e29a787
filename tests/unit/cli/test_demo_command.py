"""``demo``: what it needs, and how it hands over."""

from __future__ import annotations

import importlib.util

import pytest


@pytest.fixture
def hide(monkeypatch):
    """Make modules look as if they were not installed."""
    find = importlib.util.find_spec

    def apply(*names: str) -> None:
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name in names else find(name)
        )

    return apply


def test_missing_packages_are_named_with_what_to_install(call, hide):
    """Without its extra, the demo says what is missing before anything is started."""
    hide("sklearn", "torch")
    answer = call("demo")
    assert answer.code == 2
    assert "needs sklearn, torch," in answer.err
    assert "ckpt-tasks[demo]" in answer.err


def test_demo_under_airflow_needs_no_prefect(call, hide):
    """What is missing is named for the orchestrator that is asked for."""
    hide("airflow", "prefect")
    answer = call("demo", "--airflow")
    assert answer.code == 2
    assert "needs airflow," in answer.err
    assert "ckpt-tasks[airflow,mlflow,torch]" in answer.err


def test_a_folder_that_is_something_else_is_left_alone(call, tmp_path):
    """The demo gets its arguments, and refuses a folder that it did not make."""
    (tmp_path / "precious").write_text("data")
    answer = call("demo", "--folder", str(tmp_path))
    assert answer.code == 2
    assert str(tmp_path) in answer.err
    assert (tmp_path / "precious").read_text() == "data"


def test_half_a_word_is_no_option(call):
    """What is looked for and what is run cannot differ."""
    answer = call("demo", "--air")
    assert answer.code == 2
    assert "unrecognized arguments: --air" in answer.err
