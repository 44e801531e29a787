from __future__ import annotations

import importlib.util

import pytest
from click.testing import CliRunner

from ckpt_tasks.cli.demo import demo
from ckpt_tasks.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        ([], "prefect"),
        (["--folder", "airflow"], "prefect"),
        (["--airflow"], "airflow"),
        (["--air"], "airflow"),
        (["--folder", "somewhere", "--air"], "airflow"),
    ],
)
def test_demo_looks_for_what_it_will_run_under(
    arguments: list[str], needed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefect, unless Airflow is asked for, in full or in the short form that is taken too."""
    find = importlib.util.find_spec
    hidden = ("airflow", "prefect")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in hidden else find(name)
    )

    done = CliRunner().invoke(demo, arguments)

    assert isinstance(done.exception, ConfigError), done.output
    assert f"needs {needed}," in str(done.exception)
