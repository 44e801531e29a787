"""``demo``: what it needs, and how it hands over."""

from __future__ import annotations

import importlib.util
import signal
from pathlib import Path

import pytest

from ckpt_tasks.demo import show


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


def test_there_is_nothing_to_look_at_yet(call, tmp_path):
    """The command that makes it is named, and nothing is started."""
    answer = call("demo", "--airflow", "--look", "--folder", str(tmp_path))
    assert answer.code == 2
    assert "no demo under Airflow to look at" in answer.err
    command, _, folder = answer.err.strip().rpartition(" ")
    assert command.endswith("ckpt-tasks demo --airflow --folder")
    assert Path(folder).resolve() == tmp_path.resolve()  # as seen from here, if that is shorter


def test_an_airflow_of_ones_own_is_not_looked_at(call, tmp_path):
    """A folder `airflow` in a folder that is no demo's is not touched."""
    (tmp_path / "airflow").mkdir()
    answer = call("demo", "--airflow", "--look", "--folder", str(tmp_path))
    assert answer.code == 2
    assert list((tmp_path / "airflow").iterdir()) == []


@pytest.fixture
def heeded():
    """SIGINT is not ignored, as it is for tests that run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded")
def test_an_interrupt_is_answered_at_once(monkeypatch, capfd):
    """Ending the servers takes a while: what it waits for is told before."""
    told = []

    def look(stage, orchestrator):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            told.append(capfd.readouterr().err.strip())

    monkeypatch.setattr(show, "_look", look)
    with pytest.raises(KeyboardInterrupt):
        show.main(["--look"])
    assert told[0].startswith("interrupted: ending all")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_is_ignored_stays_so(monkeypatch, request):
    """A demo under `nohup` goes on when its terminal closes."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))

    def look(stage, orchestrator):
        signal.raise_signal(signal.SIGHUP)
        return 0

    monkeypatch.setattr(show, "_look", look)
    assert show.main(["--look"]) == 0
