"""Looking for a checkpoint newer or better than a bound, on real stores and a real MLflow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.damage import take_away
from support.made_runs import MadeAttempt, MadeRun
from support.mlflow_server import free_port

from ckpt_tasks import tasks
from ckpt_tasks.config import CheckpointConfig, RegistryConfig, StoreConfig
from ckpt_tasks.errors import ConfigError, RegistryError, StoreError
from ckpt_tasks.registry import RunDescription, load_registry
from ckpt_tasks.store import open_store
from ckpt_tasks.tasks.find import FindAnswer, FindRequest

RUN = "digits/1"

_NOISY = """
import os
from ckpt_tasks.checkpointer import catalog

original = catalog.view_run

def view_run(store, run):
    print("printed", flush=True)
    os.write(1, b"written")
    return original(store, run)

catalog.view_run = view_run
"""


@pytest.fixture
def config(tmp_path: Path) -> CheckpointConfig:
    return CheckpointConfig(store=StoreConfig(url=str(tmp_path / "store")))


@pytest.fixture
def run(config: CheckpointConfig) -> MadeRun:
    return MadeRun(open_store(config.store), RUN)


@pytest.fixture
def attempt(run: MadeRun) -> MadeAttempt:
    """It has no checkpoint yet."""
    return run.begin()


def _id(config: CheckpointConfig, **bounds: Any) -> str | None:
    found = tasks.find(config, tasks.parse_wanted(RUN, **bounds))
    return found.checkpoint.checkpoint if found else None


def _with_registry(config: CheckpointConfig, tracking_uri: str) -> CheckpointConfig:
    registry = RegistryConfig(tracking_uri=tracking_uri, experiment="digits")
    return msgspec.structs.replace(config, registry=registry)


def test_nothing_is_found_before_the_run_begins(config: CheckpointConfig) -> None:
    """Who waits may have started earlier: a run that is not there yet is no error."""
    assert _id(config) is None


def test_without_a_registry_a_committed_checkpoint_suffices(
    config: CheckpointConfig, attempt: MadeAttempt
) -> None:
    """The newest is found, with where it lies and no registration."""
    assert _id(config) is None
    attempt.commit(4)
    newest = attempt.commit(8, epoch=1)

    found = tasks.find(config, tasks.parse_wanted(RUN))

    assert found is not None
    assert found.registration is None
    assert found.checkpoint == tasks.locate(config.store, RUN, newest)


def test_newer_than_a_step(config: CheckpointConfig, attempt: MadeAttempt) -> None:
    """The step itself is not newer; a step from a template is text."""
    newest = attempt.commit(8)

    assert _id(config, newer_than=7) == newest
    assert _id(config, newer_than="7") == newest
    assert _id(config, newer_than=8) is None


def test_newer_than_a_checkpoint_goes_by_age_not_by_step(
    config: CheckpointConfig, run: MadeRun, attempt: MadeAttempt
) -> None:
    """An attempt that started over commits newer checkpoints with smaller steps."""
    first = attempt.commit(8)
    assert _id(config, newer_than=first) is None

    again = run.begin("flow-run-2", resume="fresh", takeover=True).commit(4)

    assert _id(config, newer_than=first) == again
    assert _id(config, newer_than=8) is None


def test_checkpoints_that_no_retry_would_use_are_not_found(
    config: CheckpointConfig, run: MadeRun, attempt: MadeAttempt
) -> None:
    """A later attempt went on from the beginning, so what was before is a zombie's."""
    attempt.commit(8)
    run.begin("flow-run-2", resume="fresh", takeover=True)

    assert _id(config) is None


@pytest.mark.parametrize(
    ("bound", "found"),
    [
        ("loss:min:0.6", True),
        ("loss:min:0.5", False),
        ("loss:max:0.4", True),
        ("loss:max:0.5", False),
        ("accuracy:max:0", False),
        ("loss:min:inf", True),
    ],
)
def test_better_than_a_bound(
    config: CheckpointConfig, attempt: MadeAttempt, bound: str, found: bool
) -> None:
    """Strictly better, the way that is said; a checkpoint without the metric never is."""
    newest = attempt.commit(8)

    assert _id(config, better_than=bound) == (newest if found else None)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"newer_than": "latest"}, "newer_than takes a step or a checkpoint's id.*latest"),
        ({"newer_than": "-3"}, "newer_than"),
        ({"better_than": "loss:0.5"}, "'loss:0.5'.*METRIC:min:BOUND"),
        ({"better_than": "loss:lower:0.5"}, "which way"),
        ({"better_than": "loss:min:low"}, "than what"),
        ({"better_than": ":min:1"}, "METRIC:min:BOUND"),
    ],
)
def test_bounds_that_cannot_be_read_are_refused(bounds: dict[str, Any], message: str) -> None:
    """At once, with what may be written."""
    with pytest.raises(ConfigError, match=message):
        tasks.parse_wanted(RUN, **bounds)


def test_wanted_checkpoint_says_what_it_is() -> None:
    """For logs of those who wait."""
    wanted = tasks.parse_wanted(RUN, newer_than=8, better_than="a:b:max:0.9")

    assert str(wanted) == "a checkpoint of run 'digits/1' newer than step 8 with a:b > 0.9"


def test_with_a_registry_only_registered_checkpoints_count(
    tmp_path: Path, config: CheckpointConfig, run: MadeRun, attempt: MadeAttempt
) -> None:
    """Not before the registry knows the run, nor what it has not got yet, though committed."""
    first, second = attempt.commit(8), attempt.commit(16)
    config = _with_registry(config, f"sqlite:///{tmp_path}/mlflow.db")
    assert _id(config) is None

    registry = load_registry(config.registry)
    description = RunDescription(
        run=RUN, uid=run.identity.uid, store_url=run.store.url, hyperparameters={"lr": 0.1}
    )
    registry.open_run(registry.create_run(description), description)
    assert _id(config) is None
    registration = run.register(registry, first)

    found = tasks.find(config, tasks.parse_wanted(RUN))
    assert found is not None
    assert (found.checkpoint.checkpoint, found.registration) == (first, registration)
    assert _id(config, newer_than=8) is None

    run.register(registry, second)
    assert _id(config, newer_than=8) == second


def test_registry_that_does_not_answer_is_an_error_worth_repeating(
    config: CheckpointConfig, attempt: MadeAttempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the answer that there is no checkpoint."""
    attempt.commit(8)

    with pytest.raises(RegistryError):
        _id(_with_registry(config, f"http://127.0.0.1:{free_port()}"))


def test_store_that_does_not_answer_is_an_error_worth_repeating(
    config: CheckpointConfig, run: MadeRun, attempt: MadeAttempt
) -> None:
    """Not the answer that there is no checkpoint."""
    attempt.commit(8)
    take_away(Path(config.store.url))

    with pytest.raises(StoreError, match="symbolic links"):
        _id(config)


def _ask(request: bytes, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "ckpt_tasks.tasks.find"],
        input=request,
        capture_output=True,
        env={**os.environ, **environment},
    )


def test_process_of_its_own_answers_as_the_function_does(
    config: CheckpointConfig, attempt: MadeAttempt
) -> None:
    """Request in, answer out, both JSON."""
    attempt.commit(8)
    wanted = tasks.parse_wanted(RUN, newer_than=4)

    done = _ask(msgspec.json.encode(FindRequest(config=config, wanted=wanted)))

    answer = msgspec.json.decode(done.stdout, type=FindAnswer)
    assert answer == FindAnswer(found=tasks.find(config, wanted))


def test_process_of_its_own_tells_errors_by_what_to_do(
    config: CheckpointConfig, run: MadeRun, attempt: MadeAttempt
) -> None:
    """A store that does not answer is asked again; configuration is to be mended."""
    attempt.commit(8)
    take_away(Path(config.store.url))
    wrong = msgspec.structs.replace(config, store=StoreConfig(url="nosuchscheme://x"))
    answers = [
        msgspec.json.decode(_ask(msgspec.json.encode(request)).stdout, type=FindAnswer)
        for request in (
            FindRequest(config=config, wanted=tasks.parse_wanted(RUN)),
            FindRequest(config=wrong, wanted=tasks.parse_wanted(RUN)),
        )
    ]

    assert [answer.found for answer in answers] == [None, None]
    assert [answer.retryable for answer in answers] == [True, False]
    assert "symbolic links" in (answers[0].error or "")
    assert "nosuchscheme" in (answers[1].error or "")


def test_what_libraries_print_does_not_spoil_the_answer(
    config: CheckpointConfig, attempt: MadeAttempt, tmp_path: Path
) -> None:
    """It goes to standard error, from every level of the process."""
    attempt.commit(8)
    (tmp_path / "sitecustomize.py").write_text(_NOISY)
    request = FindRequest(config=config, wanted=tasks.parse_wanted(RUN))

    done = _ask(msgspec.json.encode(request), PYTHONPATH=str(tmp_path))

    assert msgspec.json.decode(done.stdout, type=FindAnswer).found is not None
    assert b"printed" in done.stderr
    assert b"written" in done.stderr
