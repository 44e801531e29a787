"""A registry that cannot be used never fails a training; what is missing is told, and caught up."""

from __future__ import annotations

from pathlib import Path

from support.s3_servers import free_port
from support.shell import Answer, ckpt_tasks, contents

from ckpt_tasks.types import EXIT_DONE

TOY = "support.toy_training:train"
PASSWORD = b"hunter2"


def _train(folder: Path, tracking_uri: str, **environment: str) -> Answer:
    return ckpt_tasks(
        *("train", TOY, "--run", "toy", "--store", "store", "-p", "epochs=1"),
        *("--tracking-uri", tracking_uri),
        folder=folder,
        environment=environment,
    )


def _assert_trained_and_told(answer: Answer, expected: str) -> None:
    assert answer.code == EXIT_DONE, answer
    assert "Traceback" not in answer.out + answer.err
    told = [line for line in answer.warnings if "checkpoints are not registered" in line]
    assert len(told) == 1, answer
    assert expected in told[0]
    assert "start the run again, also when it is complete, to register it" in told[0]


def test_a_nonsensical_tracking_uri_costs_no_training_and_is_caught_up(tmp_path: Path) -> None:
    """A wrong URI is a warning; the same command with a right one registers what is complete."""
    answer = _train(tmp_path, "nonsense://registry")
    _assert_trained_and_told(answer, "'nonsense://registry' is nothing that MLflow opens")
    again = _train(tmp_path, "sqlite:///mlflow.db")
    assert again.code == EXIT_DONE
    assert "complete already" in again.err
    assert "registered step-00000008-a1-s1 as ckpt_tasks version 1" in again.err


def test_a_registry_that_is_not_installed_is_named_with_its_extra(tmp_path: Path) -> None:
    """Without the package training completes, and the warning says what to install."""
    (tmp_path / "mlflow.py").write_text("raise ImportError('there is no mlflow here')\n")
    tests = Path(__file__).parents[1]
    answer = _train(tmp_path, "sqlite:///mlflow.db", PYTHONPATH=f"{tmp_path}:{tests}")
    _assert_trained_and_told(answer, "pip install 'ckpt-tasks[mlflow]'")


def test_a_server_that_does_not_answer_costs_no_training_nor_its_password(tmp_path: Path) -> None:
    """Requests that wait for a server at the end are counted; its userinfo is shown nowhere."""
    uri = f"http://user:{PASSWORD.decode()}@127.0.0.1:{free_port()}"
    answer = _train(tmp_path, uri, CKPT_TASKS_ATTEMPT_DRAIN="6")
    assert "WARNING: the registry has not taken all, " in answer.err
    _assert_trained_and_told(answer, "has not taken all of it within 6 s")
    assert "http://***@127.0.0.1" in answer.err
    assert PASSWORD.decode() not in answer.out + answer.err
    assert not any(PASSWORD in data for data in contents(tmp_path / "store").values())
